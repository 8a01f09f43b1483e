"""Stage `dpo` of a recipe on a tiny random LLaVA: its length and rates, and going on after a cut."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import LeaseLost
from noria.recipes import RecipeStage
from noria.records import Json
from tests.unit.stages.material import stage, stopper, trained, write_data
from train.stages.dpo import train_preferences
from train.stages.run import Listener
from train.stages.spec import StageRun, Step, read_steps


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


LORA = {"language_model": {"policy": "lora", "rank": 2, "learning_rate": 1e-3, "dropout": 0.3}}
FULL = {"aligner": {"policy": "full", "learning_rate": 1e-3}, **LORA}


@pytest.mark.parametrize("modules", [LORA, FULL], ids=["LoRA", "aligner full"])
def test_an_interrupted_stage_goes_on_exactly(tiny_vlm: Path, data: Path, tmp_path: Path, modules: Json) -> None:
    """Killed in its sixth step and second pass, with a dropout that asks for the same random numbers again."""
    one = stage(data, "dpo", steps=7, checkpoint_every=2, schedule="cosine", warmup_ratio=0.3, modules=modules)
    report, whole = run(tiny_vlm, one, tmp_path / "whole")
    seen: list[Step] = []

    def die(step: Step) -> None:
        seen.append(step)
        if step.step == 5:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError):
        run(tiny_vlm, one, tmp_path / "cut", on_step=die)
    assert not (tmp_path / "cut" / "delta").exists()
    told, rest = run(tiny_vlm, one, tmp_path / "cut")
    assert [step.step for step in rest] == [5, 6, 7]
    assert [replace(step, seconds=0.0) for step in rest] == [replace(step, seconds=0.0) for step in whole[4:]]
    assert [step.step for step in read_steps(tmp_path / "cut" / "log.jsonl")] == list(range(1, 8))
    assert {key: told[key] for key in ("steps", "loss_first", "loss_last", "task")} == {
        key: report[key] for key in ("steps", "loss_first", "loss_last", "task")
    }
    assert trained(tmp_path / "cut").keys() == trained(tmp_path / "whole").keys()
    for name, value in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "cut")[name], value), name


def test_a_stage_that_was_cut_off_behind_its_last_step_trains_no_more(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    one = stage(data, "dpo", steps=2, modules=LORA)
    told, _ = run(tiny_vlm, one, tmp_path)
    before = trained(tmp_path)
    shutil.rmtree(tmp_path / "delta")
    again, steps = run(tiny_vlm, one, tmp_path)
    assert steps == []
    assert again["curve"] == told["curve"]
    assert all(torch.equal(value, before[name]) for name, value in trained(tmp_path).items())


@pytest.mark.parametrize("moment", ["its start", "between", "its end"])
def test_a_machine_that_stops_in_order_keeps_its_last_step(
    tiny_vlm: Path, data: Path, tmp_path: Path, moment: str
) -> None:
    """The pairs are measured, one check each; then a step checks at its start, between micro-batches, at its end."""
    one = stage(data, "dpo", steps=3, modules=LORA)
    begun: list[Step] = []
    calls = 12 + {"its end": 2 * 3, "between": 3 + 2, "its start": 2 * 3 + 1}[moment]
    with pytest.raises(LeaseLost, match="stop"):
        run(tiny_vlm, one, tmp_path, on_step=begun.append, check=stopper("shutdown", calls))
    assert [step.step for step in begun] == [1, 2]
    _, rest = run(tiny_vlm, one, tmp_path)
    assert [step.step for step in rest] == [3]


def test_cancelling_stops_between_micro_batches_and_keeps_nothing(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LeaseLost):
        run(tiny_vlm, stage(data, "dpo"), tmp_path, check=stopper("cancelled", 12 + 3 + 2))
    assert not (tmp_path / "delta").exists()
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_checkpoints_hold_what_trains_the_reference_and_no_card(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_vlm, stage(data, "dpo", steps=5, checkpoint_every=2, modules=LORA), tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-5"]
    assert all(".lora_" in name for name in load_file(kept[-1] / "trainable.safetensors"))
    assert sorted(load_file(kept[-1] / "reference.safetensors")["rows"].tolist()) == list(range(12))
