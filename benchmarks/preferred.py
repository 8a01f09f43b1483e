"""What the same preferences teach in the same minutes: a reward learnt from them and then GRPO, or DPO on the pairs.

Comes in: a home that nobody uses meanwhile (`--home`), else the embedded model is built. Goes out: a table, and in
`--out` GRPO's curves as a picture and every figure as JSON.
The demo's questions are asked twice each, and the demo's rule prefers one of the two answers, until there are `--pairs`
preferences (a home that has so many is taken as it is). Three arms start from copies of that home: GRPO under the
reward `preferences` over the captured questions; DPO for one epoch; DPO for as many epochs as fill GRPO's training
time. Each arm's version answers the held-out questions, and the rule compares these with the first version's answers
(which are also compared with themselves, asked again: what chance makes of it). Win rates have 95 % intervals. Some 90
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shared.arms import ENGINE, UNSEEN, Trained, draw_curves, follow, home_of
from noria.client import NoriaClient
from noria.demo.processes import running_system
from noria.demo.questions import held_out, training
from noria.demo.rule import WinRate, judge, win_rate
from noria.demo.traffic import Answered, ask_all, connect
from noria.errors import TrainingError
from noria.records import Json

HELD_OUT = 0.2  # of the prompts: 20 pairs at least judge the learnt reward
MOST_ROUNDS = 8


@dataclass(frozen=True)
class Arm:
    """One arm's job, and how often its version's answers are preferred to the first version's."""

    trained: Trained
    wins: WinRate

    @property
    def training_s(self) -> float:
        """Seconds of the stage `train`."""
        return self.trained.stages["train"]


def answers(url: str, seed: int) -> list[Answered]:
    """What the live version says to the held-out questions."""
    return ask_all(connect(url), held_out(), n=1, seed=seed, tick=lambda: None)


def collect(url: str, noria: NoriaClient, wanted: int) -> int:
    """Records preferences until there are so many. Raises TrainingError where the rule finds too few."""
    recorded = int(noria.status()["preferences"]["total"])
    for turn in range(MOST_ROUNDS):
        if recorded >= wanted:
            return recorded
        for one in ask_all(connect(url), training(), n=2, seed=1000 * turn, tick=lambda: None):
            verdict = judge(one.question, one.texts[0], one.texts[1])
            if verdict in ("first", "second"):
                sides = [{"completion_id": one.completion_id, "index": index} for index in (0, 1)]
                chosen, rejected = sides if verdict == "first" else reversed(sides)
                noria.record_preference(chosen=chosen, rejected=rejected, annotator="rule")
                recorded += 1
    if recorded < wanted:
        raise TrainingError(f"the rule found only {recorded} preferences in {MOST_ROUNDS} rounds; {wanted} are wanted")
    return recorded


def compared(new: list[Answered], old: list[Answered]) -> WinRate:
    """The rule's win rate of the new answers."""
    pairs = zip(new, old, strict=True)
    return win_rate(judge(one.question, one.texts[0], other.texts[0]) for one, other in pairs)


def run_arm(home: Path, log: Path, first: list[Answered], method: str, settings: Json) -> Arm:
    """Trains in a copy of the home that has the preferences, and asks."""
    with running_system(home, log=log, console=Console(stderr=True), settings=ENGINE) as url, NoriaClient(url) as noria:
        trained = follow(noria, method, {"held_out": HELD_OUT, **settings})
        return Arm(trained, compared(answers(url, 7001), first))


def grpo_settings(asked: argparse.Namespace) -> Json:
    """Captured questions under a reward that this job learns from the pairs."""
    return {
        "base": asked.base,
        "modules": {"language_model": {"rank": 16, "alpha": 32, "learning_rate": asked.rate}},
        "reward": {"rewards": [{"name": "preferences", "state": asked.state}]},
        "grpo": {
            "prompts": [{"source": "captured"}],
            "steps": asked.steps,
            "prompts_per_step": 4,
            "group_size": 8,
            "max_tokens": 64,
            "beta": asked.beta,
        },
    }


def dpo_settings(epochs: float) -> Json:
    """The demo's, for so many passes."""
    return {"modules": {"language_model": {"learning_rate": 5e-4}}, "dpo": {"epochs": epochs}}


def show(chance: WinRate, arms: dict[str, Arm]) -> None:
    """The table."""
    table = Table(title="win rate over v1 by the annotator's rule, held-out questions")
    for column in ("arm", "win rate", "won, lost", "minutes of training", "minutes in all"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    table.add_row("v1 again", _rate(chance), f"{chance.wins}, {chance.losses}", "", "")
    for name, arm in arms.items():
        minutes = (f"{arm.training_s / 60:.1f}", f"{arm.trained.seconds / 60:.1f}")
        table.add_row(name, _rate(arm.wins), f"{arm.wins.wins}, {arm.wins.losses}", *minutes)
    Console(width=130).print(table)


def _rate(found: WinRate) -> str:
    return f"{100 * found.rate:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}] of {found.n}"


def options() -> argparse.ArgumentParser:
    """The command's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preferred",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, help="a home whose live version is trained; default: the embedded model")
    parser.add_argument("--out", type=Path, default=Path("benchmark-preferred"), help="where picture and JSON go")
    parser.add_argument("--pairs", type=int, default=200, help="preferences to record (default 200)")
    parser.add_argument("--steps", type=int, default=25, help="GRPO's updates (default 25)")
    parser.add_argument("--rate", type=float, default=2e-4, help="GRPO's learning rate (default 2e-4)")
    parser.add_argument("--beta", type=float, default=0.02, help="weight of GRPO's KL to v1 (default 0.02)")
    parser.add_argument(
        "--state", choices=("last", "mean", "both"), default="last", help="what the reward's head reads"
    )
    parser.add_argument("--base", choices=("master", "gptq"), default="gptq", help="what GRPO's LoRA learns on")
    return parser


def main() -> None:
    """Collects, runs the arms, prints the table."""
    asked = options().parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(asked).items()}}
    with tempfile.TemporaryDirectory() as folder:
        scratch, console = Path(folder), Console(stderr=True)
        base = home_of(asked.home, scratch / "v1")
        log = asked.out / "v1.log"
        with running_system(base, log=log, console=console, settings=UNSEEN) as url:
            first, again = answers(url, 7001), answers(url, 8001)
        with running_system(base, log=log, console=console) as url, NoriaClient(url) as noria:
            told["preferences"] = collect(url, noria, asked.pairs)
        chance = compared(again, first)
        told["chance"] = asdict(chance)
        arms: dict[str, Arm] = {}

        def arm(name: str, method: str, settings: Json) -> Arm:
            home = home_of(base, scratch / f"arm-{len(arms)}")
            arms[name] = run_arm(home, asked.out / f"arm-{len(arms)}.log", first, method, settings)
            told["arms"] = {one: asdict(found) for one, found in arms.items()}
            (asked.out / "preferred.json").write_text(json.dumps(told, indent=2) + "\n")
            return arms[name]

        grpo = arm("reward from preferences, GRPO", "grpo", grpo_settings(asked))
        once = arm("DPO, 1 epoch", "dpo", dpo_settings(1.0))
        epochs = round(max(1.0, grpo.training_s / once.training_s), 2)
        arm(f"DPO, {epochs:g} epochs: GRPO's minutes", "dpo", dpo_settings(epochs))
        draw_curves(asked.out / "preferred.png", {"GRPO": grpo.trained.updates})
    show(chance, arms)


if __name__ == "__main__":
    main()
