"""Does GRPO teach the model that serves what it is weak at? Picture questions, an exact-answer reward, and a control.

Comes in: a home that nobody uses meanwhile (`--home`), else the embedded model is built. Goes out: a table, and in
`--out` the curves as a picture (reward, KL, ratio, length over the updates) and every figure as JSON.
The live version is asked held-out questions of each kind through the server; GRPO then trains on the kind at which it
is weakest (or `--kind`), on pictures of the training split, in a copy of the home, and the version that has come of it
is asked the same questions again. The control is the same job with rewards that are dealt to other answers
(`benchmarks.shared.shuffled`). Exit code 0 when the first rises by `POINTS` and the control does not. Both arms take
some 40 minutes each on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shared.arms import ENGINE, Trained, draw_curves, follow, home_of
from noria.client import NoriaClient
from noria.demo.processes import running_system
from noria.evals.ask import Target, ask_all
from noria.evals.metrics import score
from noria.evals.named.embedded import as_asked
from noria.evals.questions import Question
from noria.evals.scores import rate_of
from noria.records import Json
from noria.scenes import scene_questions
from noria.scenes.asked import DRAWN_KINDS
from noria.scenes.drawn.words import HELD_OUT

POINTS = 10.0
SEED = 90_000  # of the held-out pictures: neither the eyes' evaluation's nor the demo's


@dataclass(frozen=True)
class Arm:
    """What one arm showed; `before` and `after` are rates with their 95 % interval."""

    before: Json
    after: Json
    trained: Trained

    @property
    def points(self) -> float:
        """By how many points of a hundred it rose."""
        return 100.0 * float(self.after["score"] - self.before["score"])


def rate(url: str, version: str, questions: Sequence[Question], tokens: int) -> Json:
    """The share of questions that the version answers rightly, greedily, through the live server."""
    sampling = {"temperature": 0.0, "max_tokens": tokens}
    replies = ask_all(Target(url, version, "live"), questions, sampling, concurrency=8, tick=lambda: None)
    return rate_of(score(one, reply.text) for one, reply in zip(questions, replies, strict=True))


def held_out(kind: str, each: int) -> list[Question]:
    """Questions of one kind about pictures that no training shows."""
    return as_asked(scene_questions(HELD_OUT, SEED, each, (kind,)), "held out")


def job(asked: argparse.Namespace, kind: str, *, shuffled: bool) -> Json:
    """The arm's settings."""
    exact: Json = {"name": "exact"}
    if shuffled:
        exact = {"name": "python", "function": "benchmarks.shared.shuffled:reward", "label": "shuffled"}
    return {
        "base": asked.base,
        "modules": {"language_model": {"rank": 16, "alpha": 32, "learning_rate": asked.rate}},
        "reward": {"rewards": [exact]},
        "grpo": {
            "prompts": [{"source": "scenes", "kinds": [kind], "count": 2000}],
            "steps": asked.steps,
            "prompts_per_step": asked.prompts,
            "group_size": asked.group,
            "max_tokens": asked.tokens,
            "beta": asked.beta,
            "temperature": asked.temperature,
        },
    }


def run_arm(home: Path, asked: argparse.Namespace, kind: str, log: Path, *, shuffled: bool) -> Arm:
    """Asks, trains, asks again."""
    questions = held_out(kind, asked.each)
    with running_system(home, log=log, console=Console(stderr=True), settings=ENGINE) as url, NoriaClient(url) as noria:
        before = rate(url, str(noria.status()["live"]), questions, asked.tokens)
        trained = follow(noria, "grpo", job(asked, kind, shuffled=shuffled))
        return Arm(before, rate(url, trained.version, questions, asked.tokens), trained)


def kinds_of(home: Path, asked: argparse.Namespace, log: Path) -> dict[str, Json]:
    """How right the live version is about each kind."""
    with running_system(home, log=log, console=Console(stderr=True), settings=ENGINE) as url, NoriaClient(url) as noria:
        live = str(noria.status()["live"])
        return {kind: rate(url, live, held_out(kind, asked.each), asked.tokens) for kind in DRAWN_KINDS}


def show(kind: str, arms: dict[str, Arm]) -> None:
    """The table."""
    table = Table(title=f"questions of kind {kind} about held-out pictures, through the live server")
    for column in ("reward", "right before", "right after", "points", "reward, first and last tenth", "minutes"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, arm in arms.items():
        metrics = arm.trained.metrics
        table.add_row(
            name,
            _percent(arm.before),
            _percent(arm.after),
            f"{arm.points:+.1f}",
            f"{metrics['reward_first']:.3f} -> {metrics['reward_last']:.3f}",
            f"{arm.trained.seconds / 60:.1f}",
        )
    Console(width=150).print(table)


def _percent(found: Json) -> str:
    return f"{100 * found['score']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}] of {found['n']}"


def options() -> argparse.ArgumentParser:
    """The command's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, help="a home whose live version is trained; default: the embedded model")
    parser.add_argument("--out", type=Path, default=Path("benchmark-grpo"), help="where picture and JSON go")
    parser.add_argument("--kind", choices=DRAWN_KINDS, help="the kind of questions; default: v1's weakest")
    parser.add_argument("--each", type=int, default=200, help="held-out questions of a kind (default 200)")
    parser.add_argument("--steps", type=int, default=25, help="updates (default 25)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in an update (default 8)")
    parser.add_argument("--group", type=int, default=16, help="answers to a prompt (default 16)")
    parser.add_argument("--tokens", type=int, default=8, help="longest answer, in tokens (default 8)")
    parser.add_argument("--rate", type=float, default=2e-4, help="the LoRA's learning rate (default 2e-4)")
    parser.add_argument("--beta", type=float, default=0.005, help="weight of the KL to v1 (default 0.005)")
    parser.add_argument("--temperature", type=float, default=1.4, help="of the samples (default 1.4)")
    parser.add_argument("--base", choices=("master", "gptq"), default="gptq", help="what the LoRA learns on")
    parser.add_argument("--no-control", action="store_true", help="without the arm of shuffled rewards")
    return parser


def main() -> int:
    """Runs the arms; 0 when GRPO rose by so many points and its control did not."""
    asked = options().parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(asked).items()}}
    with tempfile.TemporaryDirectory() as scratch:
        first = home_of(asked.home, Path(scratch) / "v1")
        kind = asked.kind
        if kind is None:
            told["kinds"] = kinds_of(first, asked, asked.out / "v1.log")
            kind = min(told["kinds"], key=lambda one: float(told["kinds"][one]["score"]))
        arms = {}
        for name in ("exact",) if asked.no_control else ("exact", "shuffled"):
            home = home_of(first, Path(scratch) / name)
            arms[name] = run_arm(home, asked, kind, asked.out / f"{name}.log", shuffled=name == "shuffled")
            told |= {"kind": kind, "arms": {name: asdict(arm) | {"points": arm.points} for name, arm in arms.items()}}
            (asked.out / "grpo.json").write_text(json.dumps(told, indent=2) + "\n")
            draw_curves(asked.out / "grpo.png", {one: arms[one].trained.updates for one in arms})
    show(kind, arms)
    rose = {name: arm.points >= POINTS for name, arm in arms.items()}
    return 0 if rose["exact"] and not rose.get("shuffled", False) else 1


if __name__ == "__main__":
    sys.exit(main())
