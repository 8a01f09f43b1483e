"""Stages on a tiny random LLaVA: the loss against transformers' own, the cut of a batch, resuming, what stops one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import transformers
from safetensors.torch import load_file

from noria.errors import LeaseLost, TrainingError
from noria.recipes import RecipeStage
from noria.records import Json
from tests.unit.broken import poisoned, with_nan
from tests.unit.stages.material import stage, stopper, trained, write_data
from train.data.collate import SupervisedCollator
from train.data.encode import Encoder
from train.data.sources import ImageLoader, read_all
from train.methods.delta import read_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.stages.order import plan
from train.stages.run import Listener, train_supervised
from train.stages.spec import StageRun, Step, read_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(master: Path, one: RecipeStage, out: Path, *deltas: Path, **listener: Any) -> tuple[Json, list[Step]]:
    """Trains a stage in float32."""
    steps: list[Step] = []
    out.mkdir(parents=True, exist_ok=True)
    listener = {"on_step": steps.append, **listener}
    told = train_supervised(StageRun(master, deltas, one, out, dtype="float32"), Listener(**listener))
    return told, steps


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def sft(tiny_vlm: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json, list[Step]]:
    out = tmp_path_factory.mktemp("sft")
    return out, *run(tiny_vlm, stage(data, "sft"), out)


def test_the_first_loss_is_transformers_own_over_the_whole_batch(
    tiny_vlm: Path, data: Path, sft: tuple[Path, Json, list[Step]]
) -> None:
    """Mean over all answer tokens of the four samples, though they were read in two micro-batches."""
    one = stage(data, "sft")
    samples: Any = read_all(one.data, "sft")
    first = [number for micro in plan(one, range(len(samples))).micro_batches[:2] for unit in micro for number in unit]
    encoder = Encoder(load_processor(tiny_vlm), ImageLoader(named=True), 256)
    batch = SupervisedCollator(encoder)([samples[number] for number in first])
    model = load_policy(tiny_vlm, [], read_architecture(tiny_vlm), torch.float32)
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert sft[2][0].loss == pytest.approx(expected, abs=1e-5)


def test_the_cut_into_micro_batches_changes_nothing(
    tiny_vlm: Path, data: Path, sft: tuple[Path, Json, list[Step]], tmp_path: Path
) -> None:
    for micro in (1, 4):
        _, steps = run(tiny_vlm, stage(data, "sft", micro_batch_size=micro), tmp_path / str(micro))
        assert [one.loss for one in steps] == pytest.approx([one.loss for one in sft[2]], abs=1e-5)
        assert [one.tokens for one in steps] == [one.tokens for one in sft[2]]
        for name, value in trained(tmp_path / str(micro)).items():
            torch.testing.assert_close(value, trained(sft[0])[name], atol=1e-5, rtol=0, msg=name)


def test_packing_learns_from_every_answer_token(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """One step over all samples: packed into rows or alone, the loss is the same."""
    alone = stage(data, "sft", steps=1, batch_size=12, micro_batch_size=4)
    packed = stage(data, "sft", steps=1, batch_size=1, micro_batch_size=1, max_length=2048, packing=True)
    losses = [run(tiny_vlm, one, tmp_path / name)[1][0].loss for name, one in (("a", alone), ("p", packed))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_report_says_who_learnt_from_what(sft: tuple[Path, Json, list[Step]], data: Path) -> None:
    _, told, steps = sft
    assert (told["name"], told["kind"], told["steps"], len(told["curve"])) == ("one", "sft", 4, 4)
    assert told["loss_first"] == steps[0].loss > told["loss_last"]
    assert told["data"]["sha256"] == read_all(stage(data, "sft").data, "sft").sha256
    assert told["data"]["sources"][0]["counts"]["kept"] == 12
    assert told["task"]["encoded"]["whole"] == 12
    assert {module: row["policy"] for module, row in told["modules"].items()} == {
        "vision_tower": "frozen",
        "aligner": "full",
        "language_model": "lora",
    }
    assert told["settings"]["batch_size"] == 4
    assert list(told["frozen"]) == ["vision_tower"]
    assert json.loads(json.dumps(told)) == told


def test_the_delta_holds_what_trained_and_the_next_stage_starts_from_it(
    tiny_vlm: Path, data: Path, sft: tuple[Path, Json, list[Step]], tmp_path: Path
) -> None:
    folder, _, steps = sft
    names = set(trained(folder))
    assert all("multi_modal_projector" in name or ".language_model.layers." in name for name in names)
    assert {m: told["policy"] for m, told in read_policies(folder / "delta").items()}["aligner"] == "full"
    _, after = run(tiny_vlm, stage(data, "sft", steps=1, seed=0), tmp_path / "next", folder / "delta")
    assert after[0].loss < steps[0].loss - 0.1


def test_the_tower_learns_alone_and_its_heads_are_gone(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    one = stage(
        data, "vision", steps=20, batch_size=12, micro_batch_size=6, modules={"vision_tower": {"learning_rate": 1e-3}}
    )
    told, steps = run(tiny_vlm, one, tmp_path)
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert told["task"] == {"labels": {"colour": ["blue", "green", "red"]}, "words": ["blue", "green", "red"]}
    assert {"accuracy/colour", "accuracy/patches", "iou"} <= set(told["curve"][-1])
    delta = trained(tmp_path)
    assert delta
    assert all(name.startswith("model.vision_tower.") for name in delta)
    assert sorted(told["frozen"]) == ["aligner", "language_model"]
    model = load_policy(tiny_vlm, [tmp_path / "delta"], read_architecture(tiny_vlm), torch.float32)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in delta.items())


@pytest.mark.parametrize("kind", ["vision", "sft"])
def test_an_interrupted_stage_goes_on_exactly(tiny_vlm: Path, data: Path, tmp_path: Path, kind: str) -> None:
    """Killed in its sixth step, with a dropout that asks for the same random numbers again."""
    lora = {"language_model": {"policy": "lora", "dropout": 0.3}} if kind == "sft" else {}
    one = stage(data, kind, steps=7, checkpoint_every=2, schedule="cosine", warmup_ratio=0.3, modules=lora)
    _, whole = run(tiny_vlm, one, tmp_path / "whole")
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
    assert [step.loss for step in rest] == [step.loss for step in whole[4:]]
    assert [step.step for step in read_steps(tmp_path / "cut" / "log.jsonl")] == list(range(1, 8))
    assert told["steps"] == 7
    assert same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))


def test_text_alone_teaches_an_aligner_nothing_and_stops_nothing(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """Micro-batches of one: every third has no picture, so that no gradient can come from it."""
    one = stage(data, "align", steps=3, micro_batch_size=1)
    whole = stage(data, "align", steps=3, micro_batch_size=4)
    _, steps = run(tiny_vlm, one, tmp_path / "one")
    _, expected = run(tiny_vlm, whole, tmp_path / "four")
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], abs=1e-5)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "conversations.jsonl").write_text(
        (data / "conversations.jsonl").read_text().splitlines()[0] + "\n"
    )
    alone = stage(tmp_path / "text", "align", steps=1, batch_size=1, micro_batch_size=1)
    with pytest.raises(TrainingError, match="stage 'one' trains what reads pictures, and no picture is in its data"):
        run(tiny_vlm, alone, tmp_path / "alone")


def test_checkpoints_hold_what_trains_and_no_more(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_vlm, stage(data, "align", steps=5, checkpoint_every=2), tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"][-len(kept) :]
    names = load_file(kept[-1] / "trainable.safetensors")
    assert all("multi_modal_projector" in name for name in names)
    assert not list(kept[-1].glob("model*"))


def test_a_checkpoint_that_was_cut_off_is_not_believed(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    one = stage(data, "align", steps=4, checkpoint_every=2)
    run(tiny_vlm, one, tmp_path)
    first = trained(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-4" / "whole").unlink()
    _, rest = run(tiny_vlm, one, tmp_path)
    assert [step.step for step in rest] == [3, 4]
    assert same(trained(tmp_path), first)


@pytest.mark.parametrize("moment", ["its start", "between", "its end"])
def test_a_machine_that_stops_in_order_keeps_its_last_step(
    tiny_vlm: Path, data: Path, tmp_path: Path, moment: str
) -> None:
    """The samples are measured, one check each; then a step checks at its start, between micro-batches, at its end."""
    one = stage(data, "align", steps=4)
    whole = tmp_path / "whole"
    run(tiny_vlm, one, whole)
    begun: list[Step] = []
    calls = 12 + {"its end": 2 * 3, "between": 3 + 2, "its start": 2 * 3 + 1}[moment]
    with pytest.raises(LeaseLost, match="stop"):
        run(tiny_vlm, one, tmp_path / "cut", on_step=begun.append, check=stopper("shutdown", calls))
    assert [step.step for step in begun] == [1, 2]
    _, rest = run(tiny_vlm, one, tmp_path / "cut")
    assert [step.step for step in rest] == [3, 4]
    assert same(trained(tmp_path / "cut"), trained(whole))


def test_a_stage_that_was_cut_off_behind_its_last_step_trains_no_more(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    one = stage(data, "align", steps=2)
    run(tiny_vlm, one, tmp_path)
    before = trained(tmp_path)
    shutil.rmtree(tmp_path / "delta")
    _, steps = run(tiny_vlm, one, tmp_path)
    assert steps == []
    assert same(trained(tmp_path), before)


def test_who_hears_of_a_step_may_stop_the_machine(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.step == 2:
            raise LeaseLost("stop", code="shutdown")

    with pytest.raises(LeaseLost, match="stop"):
        run(tiny_vlm, stage(data, "align"), tmp_path, on_step=stop)
    _, rest = run(tiny_vlm, stage(data, "align"), tmp_path)
    assert [step.step for step in rest] == [3, 4]


def test_cancelling_stops_between_micro_batches(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LeaseLost):
        run(tiny_vlm, stage(data, "align"), tmp_path, check=stopper("cancelled", 12 + 2))
    assert not (tmp_path / "delta").exists()
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_a_non_finite_loss_stops_before_the_step_and_names_the_rows(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    broken = with_nan(tiny_vlm, tmp_path / "broken")
    with pytest.raises(
        TrainingError, match=r"loss nan is not finite; stopped before .*conversations\.jsonl:\d+"
    ) as stop:
        run(broken, stage(data, "align"), tmp_path / "out")
    assert stop.value.code == "non_finite"
    assert read_steps(tmp_path / "out" / "log.jsonl") == []
    assert not (tmp_path / "out" / "delta").exists()


def test_a_non_finite_gradient_stops_before_the_step(
    tiny_vlm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.stages.run.load_policy", poisoned)
    with pytest.raises(TrainingError, match=r"gradient of .*multi_modal_projector.* is not finite") as stop:
        run(tiny_vlm, stage(data, "align"), tmp_path)
    assert stop.value.code == "non_finite"
    assert not (tmp_path / "delta").exists()


def test_learning_rates_follow_the_schedule(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    rates = {"aligner": {"learning_rate": 1e-3}}
    for schedule, expected in {
        "constant": [0.0, 5e-4, 1e-3, 1e-3],
        "linear": [0.0, 5e-4, 1e-3, 5e-4],
        "constant-linear": [0.0, 1e-3, 1e-3, 5e-4],
    }.items():
        more = {"warmup_ratio": 0.25, "decay_ratio": 0.5} if schedule == "constant-linear" else {"warmup_ratio": 0.5}
        one = stage(data, "align", schedule=schedule, modules=rates, **more)
        assert [step.learning_rate for step in run(tiny_vlm, one, tmp_path / schedule)[1]] == pytest.approx(expected)


def test_transformers_prints_and_sends_nothing(tiny_vlm: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    run(tiny_vlm, stage(data, "align", steps=1), tmp_path)
    assert "{'loss'" not in capfd.readouterr().out
    assert transformers.trainer_utils.get_last_checkpoint(str(tmp_path)) is None
