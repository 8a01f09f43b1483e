"""What one stage is given and what it tells: values that cross to other processes as JSON.

Comes in: the recipe's stage, where the model and the pictures lie. Goes out: `StageRun`, `Step`, the stage's report.
Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from noria.methods.table import LABELLED_KINDS
from noria.recipes import RecipeStage
from noria.records import Json

CURVE_POINTS = 200
DELTA, LOG, REPORT, CHECKPOINTS = "delta", "log.jsonl", "report.json", "checkpoints"


@dataclass(frozen=True)
class StageRun:
    """One stage, ready to run: `deltas` are those of the lineage and of the stages before, oldest first.

    `folder` is the stage's own; `blobs` the fsspec URL of stored pictures; `dtype` that of frozen weights (none: the
    machine's); `base` and `serving` are those of `train.methods.policy_model`; `accelerate_config` a file for
    `accelerate launch`, which then starts even a single process.
    """

    master: Path
    deltas: tuple[Path, ...]
    stage: RecipeStage
    folder: Path
    blobs: str | None = None
    processes: int = 1
    accelerate_config: Path | None = None
    dtype: str | None = None
    base: str = "master"
    serving: Path | None = None

    def to_json(self) -> Json:
        """The run as JSON."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        told["stage"] = self.stage.model_dump(mode="json")
        told["deltas"] = [str(one) for one in self.deltas]
        return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}

    @classmethod
    def from_json(cls, told: Json) -> StageRun:
        """The run that `to_json` told."""
        paths = ("master", "folder", "accelerate_config", "serving")
        values: dict[str, Any] = {
            name: Path(value) if name in paths and value else value for name, value in told.items()
        }
        deltas = tuple(Path(one) for one in told["deltas"])
        values |= {"deltas": deltas, "stage": RecipeStage.model_validate(told["stage"])}
        return cls(**values)


def base_of(stage: RecipeStage, base: str) -> str:
    """What the stage trains on. A vision stage trains the tower alone, which no 4-bit base changes."""
    return "master" if stage.kind in LABELLED_KINDS else base


def precision_conflict(
    stage: RecipeStage, base: str, accelerate_config: Path | None = None, dtype: str | None = None
) -> str | None:
    """Why the stage's precision would be ignored, naming both keys; none where it would not."""
    deciding = {
        f"dtype={dtype!r}": dtype is not None,
        f"train.base={base!r}": base != "master",
        f"train.accelerate_config={str(accelerate_config)!r}": accelerate_config is not None,
    }
    key = next((key for key, decides in deciding.items() if decides), None)
    if stage.precision == "auto" or key is None:
        return None
    said = f"stages.{stage.name}.precision={stage.precision!r}"
    return f"{said} would be ignored: {key} decides what is computed in; drop one of the two"


@dataclass(frozen=True)
class Step:
    """One optimiser step. `tokens` were read in it (pictures, in a vision stage), over all processes."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def read_steps(log: Path) -> list[Step]:
    """The steps of a log, in order; a line that was cut off is left out."""
    if not log.is_file():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [Step(**json.loads(line)) for line in lines if line.endswith("}\n")]


def write_steps(log: Path, steps: Iterable[Step]) -> None:
    """Writes a log anew."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))


def append_step(log: Path, step: Step) -> None:
    """Adds one line to a log."""
    with log.open("a") as file:
        file.write(json.dumps(asdict(step)) + "\n")


def curve(steps: Sequence[Step], points: int = CURVE_POINTS) -> list[Json]:
    """At most `points` points over the whole stage: means of neighbouring steps, each at its last step."""
    if not steps:
        return []
    width = -(-len(steps) // points)
    return [_point(steps[start : start + width]) for start in range(0, len(steps), width)]


def _point(steps: Sequence[Step]) -> Json:
    told: dict[str, Any] = {"step": steps[-1].step}
    for name in ("loss", "grad_norm", "learning_rate"):
        told[name] = _mean([getattr(step, name) for step in steps])
    for name in steps[-1].metrics:
        told[name] = _mean([step.metrics[name] for step in steps if name in step.metrics])
    return told


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
