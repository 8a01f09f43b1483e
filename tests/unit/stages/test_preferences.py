"""Stage `dpo` of a recipe on a tiny random LLaVA: its length and rates, and going on after a cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from noria.recipes import RecipeStage
from noria.records import Json
from tests.unit.stages.material import stage, write_data
from train.stages.dpo import train_preferences
from train.stages.run import Listener
from train.stages.spec import StageRun, Step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(master: Path, one: RecipeStage, out: Path, **listener: Any) -> tuple[Json, list[Step]]:
    """Trains the stage in float32."""
    steps: list[Step] = []
    out.mkdir(parents=True, exist_ok=True)
    listener = {"on_step": steps.append, **listener}
    return train_preferences(StageRun(master, (), one, out, dtype="float32"), Listener(**listener)), steps


@pytest.mark.parametrize(
    ("schedule", "more", "expected"),
    [
        (None, {"warmup_ratio": 0.5}, [0.0, 5e-4, 1e-3, 5e-4]),
        ("linear", {"warmup_ratio": 0.5}, [0.0, 5e-4, 1e-3, 5e-4]),
        ("constant", {"warmup_ratio": 0.5}, [0.0, 5e-4, 1e-3, 1e-3]),
        ("constant-linear", {"warmup_ratio": 0.25, "decay_ratio": 0.5}, [0.0, 1e-3, 1e-3, 5e-4]),
    ],
)
def test_the_schedule_counts(
    tiny_vlm: Path, data: Path, tmp_path: Path, schedule: str | None, more: Json, expected: list[float]
) -> None:
    rates = {"language_model": {"learning_rate": 1e-3, "rank": 2}}
    _, steps = run(tiny_vlm, stage(data, "dpo", schedule=schedule, modules=rates, **more), tmp_path)
    assert [step.learning_rate for step in steps] == pytest.approx(expected)


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 4, 3), (1, 8, 2), (1.5, 8, 3), (0.3, 4, 1)])
def test_epochs_are_passes_over_all_pairs(
    tiny_vlm: Path, data: Path, tmp_path: Path, epochs: float, batch: int, steps: int
) -> None:
    """Of the twelve pairs; a pass ends with a smaller batch where they do not divide."""
    told, _ = run(tiny_vlm, stage(data, "dpo", epochs=epochs, batch_size=batch, micro_batch_size=4), tmp_path)
    assert (told["steps"], told["task"]["pairs"]) == (steps, 12)
