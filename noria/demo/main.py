"""`noria demo`: the loop once, from an empty home to a better version, through the public interfaces alone.

Comes in: a folder. Goes out: a table on the terminal, `demo.json` and `training.png` in the folder.
Must not import torch, vllm, serve or train: it does what a user could do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from noria.client import NoriaClient
from noria.client.shapes import Job
from noria.demo.processes import running_system
from noria.demo.questions import PICTURES, held_out, training
from noria.demo.report import DemoResult, as_json, draw, table
from noria.demo.rule import is_right, judge, win_rate
from noria.demo.traffic import Answered, BackgroundUser, ask_all, connect
from noria.errors import TrainingError
from noria.evals.scores import rate_of

if TYPE_CHECKING:
    from openai import OpenAI

    from noria.evals.questions import Question

LEAST_PREFERENCES = 120  # seen once each: fewer pairs seen twice are learnt by heart, and the rule is not
MOST_ROUNDS = 4
TRAINING_SETTINGS: dict[str, Any] = {
    "held_out": 0.1,
    "modules": {"language_model": {"learning_rate": 5e-4}},
    "dpo": {"epochs": 1.0},
}


class Clock:
    """Seconds of each named stage, in order."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the block's duration to the stage `name`."""
        started = time.monotonic()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - started


def run(out: Path, home: Path | None = None, *, as_json_text: bool = False) -> int:
    """Runs the demo and returns the exit status: 0 when it passed.

    Raises NoriaError when a part of the system fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    clock = Clock()
    home = home or out / time.strftime("home-%Y%m%d-%H%M%S")
    with ExitStack() as stack:
        with clock.time("start, the embedded model included"):
            url = stack.enter_context(running_system(home, log=out / "noria.log", console=console))
        noria = stack.enter_context(NoriaClient(url))
        result = _turn(url, noria, clock, console)
    (out / "demo.json").write_text(json.dumps(as_json(result), indent=2) + "\n")
    draw(result, out / "training.png")
    if as_json_text:
        print(json.dumps(as_json(result)))
    else:
        Console().print(table(result))
    console.print(f"The picture of loss and margins is {out / 'training.png'}; all figures are in {out / 'demo.json'}.")
    return 0 if result.passed else 1


def _turn(url: str, noria: NoriaClient, clock: Clock, console: Console) -> DemoResult:
    client = connect(url)
    old = str(noria.status()["live"])
    with clock.time("questions and preferences"):
        preferences, asked = _collect(client, noria, console)
    with clock.time("held-out answers before"):
        first = _answers(client, held_out(), 7001, console, f"held-out answers of {old}")
        second = _answers(client, held_out(), 8001, console, f"held-out answers of {old}, again")
    with BackgroundUser(connect(url), held_out()) as background:
        job, steps = _retrain(noria, clock, console)
        new = str(job["version"])
        with clock.time("held-out answers after"):
            after = _answers(client, held_out(), 7001, console, f"held-out answers of {new}")
    rollout = next(one for one in noria.rollouts() if one["version"] == new)
    metrics = job["metrics"]
    counts = noria.version(new)["metrics"]["counts"]
    return DemoResult(
        stages=clock.stages,
        preferences=preferences,
        training_pairs=metrics["pairs"],
        held_out_pairs=counts["held_out"],
        loss_first=steps[0]["loss"],
        loss_last=steps[-1]["loss"],
        before=_compare(second, first),
        after=_compare(after, first),
        pictures_before=_right_about_pictures(first),
        pictures_after=_right_about_pictures(after),
        quantization_kl=metrics["mean_kl"],
        swap_pause_s=rollout["metrics"]["pause_s"],
        slowest_request_s=background.slowest_s,
        requests=asked + 3 * len(held_out()) + background.answered + len(background.failures),
        failures=tuple(background.failures),
        background_versions=background.versions,
        versions=(old, new),
        steps=tuple(steps),
    )


def _answers(client: OpenAI, questions: Sequence[Question], seed: int, console: Console, what: str) -> list[Answered]:
    with _progress(console) as progress:
        task = progress.add_task(what, total=len(questions))
        return ask_all(client, questions, n=1, seed=seed, tick=lambda: progress.advance(task))


def _collect(client: OpenAI, noria: NoriaClient, console: Console) -> tuple[int, int]:
    """Asks and judges until there are enough preferences; returns the numbers of preferences and of questions."""
    recorded = asked = 0
    for turn in range(MOST_ROUNDS):
        with _progress(console) as progress:
            task = progress.add_task(f"questions, two answers each (round {turn + 1})", total=len(training()))
            answers = ask_all(client, training(), n=2, seed=1000 * turn, tick=lambda: progress.advance(task))  # noqa: B023
        asked += len(answers)
        recorded += sum(_record(noria, answer) for answer in answers)
        console.print(f"{recorded} preferences recorded")
        if recorded >= LEAST_PREFERENCES:
            return recorded, asked
    raise TrainingError(
        f"the rule found only {recorded} preferences in {asked} questions; {LEAST_PREFERENCES} are needed"
    )


def _record(noria: NoriaClient, answer: Answered) -> int:
    verdict = judge(answer.question, answer.texts[0], answer.texts[1])
    if verdict not in ("first", "second"):
        return 0
    sides = [{"completion_id": answer.completion_id, "index": index} for index in (0, 1)]
    chosen, rejected = sides if verdict == "first" else reversed(sides)
    noria.record_preference(chosen=chosen, rejected=rejected, annotator="rule")
    return 1


def _retrain(noria: NoriaClient, clock: Clock, console: Console) -> tuple[Job, list[dict[str, Any]]]:
    """Starts a job, follows it to its end, and returns it with one dict per optimiser step."""
    job = noria.create_job(method="dpo", settings=TRAINING_SETTINGS, rollout="direct")
    steps: list[dict[str, Any]] = []
    stages: list[tuple[str, float]] = []
    with _progress(console) as progress:
        task = progress.add_task("job", total=100)
        for event in noria.watch_job(job["id"]):
            data = event["data"]
            if event["kind"] == "stage":
                stages.append((data["stage"], event["at"]))
            if event["kind"] == "metrics" and "loss" in data:
                steps.append(data)
            label = f"job: {stages[-1][0]}" if stages else "job: waiting for the trainer"
            share = data.get("progress")
            progress.update(task, description=label, completed=None if share is None else 100 * share)
        ended = noria.job(job["id"])
        progress.update(task, completed=100 if ended["state"] == "succeeded" else None)
    if ended["state"] != "succeeded" or ended["finished_at"] is None:
        raise TrainingError(f"job {ended['id']} {ended['state']} at stage {ended['stage']}: {ended['error']}")
    stages.append(("end", ended["finished_at"]))
    for (name, began), (_, ends) in pairwise(stages):
        clock.stages[name] = clock.stages.get(name, 0.0) + ends - began
    return ended, steps


def _compare(new: list[Answered], old: list[Answered]) -> Any:
    pairs = zip(new, old, strict=True)
    return win_rate(judge(one.question, one.texts[0], other.texts[0]) for one, other in pairs)


def _right_about_pictures(answers: list[Answered]) -> dict[str, Any]:
    pictures = [one for one in answers if one.question.file == PICTURES]
    return rate_of(is_right(one.question, one.texts[0]) for one in pictures)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=False)
