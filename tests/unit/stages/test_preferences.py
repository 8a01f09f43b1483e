"""Preference stages of a recipe on a tiny random LLaVA: length and rates, loss, and going on after a cut."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import LeaseLost, TrainingError
from noria.recipes import RecipeStage
from noria.records import Json
from tests.unit.stages.material import stage, stopper, trained, write_data, write_rows
from train.stages.preferences import train_preferences
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


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("dpo", LORA), ("dpo", FULL), ("simpo", LORA), ("mpo", LORA), ("kto", LORA), ("kto", FULL)],
    ids=["dpo", "dpo aligner full", "simpo", "mpo", "kto", "kto aligner full"],
)
def test_an_interrupted_stage_goes_on_exactly(
    tiny_vlm: Path, data: Path, tmp_path: Path, kind: str, modules: Json
) -> None:
    """Killed in its sixth step and second pass, with a dropout that asks for the same random numbers again."""
    one = stage(data, kind, steps=7, checkpoint_every=2, schedule="cosine", warmup_ratio=0.3, modules=modules)
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


def test_a_checkpoint_of_a_method_without_a_reference_holds_none(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_vlm, stage(data, "orpo", steps=2, modules=LORA), tmp_path)
    kept = tmp_path / "checkpoints" / "checkpoint-2"
    assert (kept / "trainable.safetensors").is_file()
    assert not (kept / "reference.safetensors").exists()


def test_a_checkpoint_of_mpo_holds_its_reward_shift(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """Of six micro-batches of two; the first two of them had no reward yet."""
    run(tiny_vlm, stage(data, "mpo", steps=3, modules=LORA), tmp_path)
    mean, batches = load_file(tmp_path / "checkpoints" / "checkpoint-3" / "reference.safetensors")["shift"].tolist()
    assert batches == 6
    assert mean != 0.0


@pytest.mark.parametrize(
    ("kind", "loss", "first"),
    [
        ("dpo", {"dpo": {"loss_type": "hinge"}}, 1.0),
        ("dpo", {"dpo": {"loss_type": "ipo"}, "beta": 0.5}, 1.0),
        ("mpo", {"mpo": {"generation_weight": 0.0, "quality_weight": 0.0, "preference_weight": 2.0}}, 2 * math.log(2)),
        ("kto", {"kto": {"desirable_weight": 3.0, "undesirable_weight": 3.0}}, 1.5),
    ],
)
def test_a_stages_loss_is_what_its_table_says(
    tiny_vlm: Path, data: Path, tmp_path: Path, kind: str, loss: Json, first: float
) -> None:
    told, steps = run(tiny_vlm, stage(data, kind, steps=1, modules=LORA, **loss), tmp_path)
    assert steps[0].loss == pytest.approx(first, rel=1e-5)
    assert told["settings"].items() >= loss.items()
    assert told["kind"] == kind


def test_kto_learns_from_verdicts_and_from_pairs_taken_apart(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    told, steps = run(tiny_vlm, stage(data, "kto", epochs=1, modules=LORA), tmp_path / "verdicts")
    assert {name: told["task"][name] for name in ("answers", "up", "down")} == {"answers": 12, "up": 9, "down": 3}
    assert told["steps"] == 3
    assert steps[0].metrics["kl"] == 0.0
    apart = stage(data, "kto", epochs=1, modules=LORA)
    apart = apart.model_copy(update={"data": stage(data, "dpo").data})
    told, _ = run(tiny_vlm, apart, tmp_path / "pairs")
    assert {name: told["task"][name] for name in ("answers", "up", "down")} == {"answers": 24, "up": 12, "down": 12}
    assert told["steps"] == 6


@pytest.mark.parametrize(("label", "word"), [(True, "good"), (False, "bad")])
def test_answers_that_are_all_good_or_all_bad_are_refused(
    tiny_vlm: Path, data: Path, tmp_path: Path, label: bool, word: str
) -> None:
    rows = [{**json.loads(line), "label": label} for line in (data / "verdicts.jsonl").read_text().splitlines()]
    write_rows(data / f"{word}.jsonl", rows)
    one = stage(data, "kto", modules=LORA)
    one = one.model_copy(
        update={"data": tuple(source.model_copy(update={"source": str(data / f"{word}.jsonl")}) for source in one.data)}
    )
    with pytest.raises(TrainingError, match=rf"all 12 answers that fit are {word}: .* add rows with the other") as told:
        run(tiny_vlm, one, tmp_path)
    assert told.value.code == "one_sided"
