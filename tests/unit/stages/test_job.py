"""A recipe as a job: its data frozen first, its stages in order, each of them resumed, the deltas handed on."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from noria.errors import Conflict, NotFound, SettingsError, TrainingError
from noria.records import Json, image_references
from tests.unit.stages.material import write_data, write_rows
from train.daemon import Trainer, job_context, job_settings
from train.data import calibration
from train.data.samples import Sample, image_part
from train.methods.delta import changed_modules, delta_folders
from train.pipeline import learn, prepare
from train.pipeline.context import JobContext
from train.run import _claim as taken_up
from train.run import main as run_main
from train.stages.job import spread_rows
from train.stages.spec import read_steps

FIGURES = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 256}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def recipe(data: Path, **more: Any) -> Json:
    """Eyes, then conversations, then preferences."""
    stages = [
        {"name": "eyes", "kind": "vision", "data": [{"source": str(data / "labels.jsonl")}], **FIGURES},
        {"name": "talk", "kind": "sft", "data": [{"source": str(data / "conversations.jsonl")}], **FIGURES},
        {"name": "prefer", "kind": "dpo", "data": [{"source": str(data / "preferences.jsonl")}], **FIGURES},
    ]
    return {"name": "tiny", "stages": stages, **more}


def started(trainer: Trainer, settings: Json) -> JobContext:
    """A job of this trainer, its folder made."""
    ctx = job_context(trainer, trainer.store.start_job("recipe", settings, "none", trainer.owner, 60.0))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx


def test_the_stages_run_in_order_and_hand_on_their_deltas(trainer: Trainer, data: Path) -> None:
    ctx = started(trainer, {"recipe": recipe(data)})
    ctx.done["snapshot"] = prepare.run(ctx)
    assert ctx.done["snapshot"]["counts"] == {"eyes": 12, "talk": 12, "prefer": 12}
    told = learn.run(ctx)
    assert told["steps"] == 6
    assert "stages" not in told  # curves are for the manifest, not for the store
    deltas = delta_folders(ctx.folder / "adapter")
    assert [path.name for path in deltas] == ["01-eyes", "02-talk", "03-prefer"]
    assert [changed_modules([path]) for path in deltas] == [
        ("vision_tower",),
        ("aligner", "language_model"),
        ("language_model",),
    ]
    report = json.loads((ctx.folder / "train" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["eyes", "talk", "prefer"]
    for stage in report["stages"]:
        assert stage["data"]["sha256"].startswith("sha256:")
        assert 1 <= len(stage["curve"]) <= 200
    assert report["stages"][2]["curve"][0]["loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # the reference has the stages before
    assert not list(ctx.folder.glob("train/*/checkpoints"))
    kinds = [event.kind for event in trainer.store.events(ctx.job.id)]
    assert kinds.count("metrics") >= 3


def test_a_stage_that_is_done_is_not_done_again(trainer: Trainer, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage breaks once: the next attempt begins there, and the first one's delta is the same bytes."""
    ctx = started(trainer, {"recipe": recipe(data)})
    ctx.done["snapshot"] = prepare.run(ctx)

    def gone(*args: Any) -> Any:
        raise TrainingError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr("train.stages.run.LanguageTask", gone)
        with pytest.raises(TrainingError, match="the disk went away"):
            learn.run(ctx)
    first = ctx.folder / "train" / "01-eyes" / "delta" / "full.safetensors"
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    again = job_context(trainer, ctx.job)
    again.done.update(ctx.done)
    learn.run(again)
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert [step.step for step in read_steps(ctx.folder / "train" / "02-talk" / "log.jsonl")] == [1, 2]


def test_calibration_takes_rows_of_the_last_stage_that_answers(trainer: Trainer, data: Path) -> None:
    ctx = started(trainer, {"recipe": recipe(data, quantize={"calibration_samples": 5}, verify={"samples": 3})})
    prepare.run(ctx)
    chosen = prepare.snapshot_file(ctx)["samples"]
    assert (len(chosen["calibration"]), len(chosen["verification"])) == (5, 3)
    rows = [one["row"] for part in ("calibration", "verification") for one in chosen[part]]
    assert len(set(rows)) == 8
    assert all("preferences.jsonl:" in row for row in rows)
    found = calibration.samples(chosen["calibration"], {}, ctx.store.get_completion, ctx.images, ctx.data_images)
    assert [list(reference) for reference, _ in found] == [["row"]] * 5
    assert all(sample.messages[-1]["role"] == "assistant" for _, sample in found)
    assert any(sample.images for _, sample in found)


def test_pictures_that_rows_carry_go_to_the_blobs(trainer: Trainer, data: Path, tmp_path: Path) -> None:
    pictures = [(data / f"{number}.png").read_bytes() for number in range(4)]
    rows = []
    for number, picture in enumerate(pictures):
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        asked = {"role": "user", "content": [image_part(url), {"type": "text", "text": f"which is {number}"}]}
        rows.append({"messages": [asked, {"role": "assistant", "content": "this"}]})
    write_rows(tmp_path / "rows.jsonl", rows)
    stage = {"name": "talk", "kind": "sft", "data": [{"source": str(tmp_path / "rows.jsonl")}], **FIGURES}
    ctx = started(trainer, {"recipe": {"name": "tiny", "stages": [stage]}})
    ctx.done["snapshot"] = prepare.run(ctx)
    named = [image_references(one["messages"]) for one in prepare.snapshot_file(ctx)["samples"]["calibration"]]
    assert sorted(named) == sorted((hashlib.sha256(picture).hexdigest(),) for picture in pictures)
    assert {trainer.blobs.get(sha256) for (sha256,) in named} == set(pictures)
    assert learn.run(ctx)["steps"] == 2
    assert "base64" not in "".join(path.read_text() for path in ctx.folder.rglob("*.json*"))


def test_the_recipe_names_its_model(trainer: Trainer, data: Path) -> None:
    for model in (None, "v1", "tiny"):
        ctx = started(trainer, {"recipe": recipe(data, **({"model": model} if model else {}))})
        assert prepare.run(ctx)["parent"] == "v1"
        trainer.store.finish_job(ctx.job.id, trainer.owner, "cancelled")
    ctx = started(trainer, {"recipe": recipe(data, model="other")})
    with pytest.raises(NotFound, match=r"model 'other' of recipe 'tiny' is no version and no model.*v1, tiny"):
        prepare.run(ctx)


def test_missing_data_is_told_before_anything_is_trained(trainer: Trainer, data: Path) -> None:
    wrong = recipe(data)
    wrong["stages"][2]["data"] = [{"source": str(data / "gone.jsonl")}]
    ctx = started(trainer, {"recipe": wrong})
    with pytest.raises(NotFound, match=r"gone\.jsonl"):
        prepare.run(ctx)


def test_a_4_bit_base_that_a_recipe_cannot_use_is_refused(trainer: Trainer, data: Path) -> None:
    ctx = started(trainer, {"recipe": recipe(data), "base": "gptq"})
    with pytest.raises(Conflict, match=r"train\.base='gptq'.*recipe 'tiny' has 3 stages"):
        prepare.run(ctx)


def test_a_jobs_settings_win_over_the_recipes_and_those_over_ours(trainer: Trainer, data: Path) -> None:
    asked = {"recipe": recipe(data, quantize={"group_size": 64, "damp": 0.02}), "quantize": {"damp": 0.03}}
    made, train = job_settings(trainer.settings.train, {**asked, "processes": 2})
    assert made is not None
    assert (train.quantize.group_size, train.quantize.damp, train.processes) == (64, 0.03, 2)
    with pytest.raises(SettingsError, match=r"settings\.recipe: stages\.eyes\.steps"):
        job_settings(
            trainer.settings.train, {"recipe": {"name": "x", "stages": [{**asked["recipe"]["stages"][0], "steps": 0}]}}
        )


def test_one_job_at_a_time(trainer: Trainer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    source = f'data = [{{ source = "{data / "labels.jsonl"}" }}]'
    path.write_text(f'name = "mine"\n[[stages]]\nname = "eyes"\nkind = "vision"\nsteps = 1\n{source}\n')
    other = trainer.store.create_job("dpo", {}, "none")
    with pytest.raises(Conflict, match=rf"job {other.id} \(dpo\) is queued, and one job runs at a time: wait") as error:
        run_main(trainer.settings, [str(path)])
    assert error.value.code == "job_runs"
    claimed = trainer.store.claim_job("trainer-gone", -1.0)
    assert claimed is not None
    with pytest.raises(Conflict, match=rf"job {other.id} \(dpo\) was left by its trainer.*--resume"):
        run_main(trainer.settings, [str(path)])
    assert [job.id for job in trainer.store.list_jobs()] == [other.id]
    trainer.store.request_cancel(other.id)
    with pytest.raises(Conflict, match="no job was left to go on with"):
        run_main(trainer.settings, ["--resume"])
    with pytest.raises(SettingsError, match="name a recipe, or say --resume"):
        run_main(trainer.settings, [])


def test_what_a_killed_trainer_holds_is_waited_for(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    left = trainer.store.create_job("dpo", {}, "none")
    assert trainer.store.claim_job("trainer-killed", 3.0) is not None
    job = taken_up(trainer, None, "none")
    assert (job.id, job.owner, job.attempt) == (left.id, trainer.owner, 2)
    assert f"job {left.id} belongs to another trainer for" in capsys.readouterr().err


def test_what_a_trainer_that_lives_holds_is_not_waited_for(trainer: Trainer) -> None:
    left = trainer.store.create_job("dpo", {}, "none")
    assert trainer.store.claim_job("trainer-alive", 60.0) is not None
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.05):
            trainer.store.heartbeat(left.id, "trainer-alive", 60.0)

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(Conflict, match=f"job {left.id} is trained elsewhere: its trainer is alive"):
            taken_up(trainer, None, "none")
    finally:
        over.set()
        alive.join()


@pytest.mark.parametrize(
    ("pictured", "plain", "taken"), [(90, 10, (10, 10)), (90, 4, (16, 4)), (5, 90, (5, 15)), (0, 90, (0, 20))]
)
def test_what_gptq_is_shown_is_half_plain_text_where_there_is_enough(
    pictured: int, plain: int, taken: tuple[int, int]
) -> None:
    """Of 16 to calibrate on and 4 to verify on: spread over both, and no row in two places."""
    asked = {"role": "user", "content": "what"}
    shown = [Sample((asked,), ("picture",), f"shown:{number}") for number in range(pictured)]
    said = [Sample((asked,), (), f"said:{number}") for number in range(plain)]
    rows = [row["row"] for row in spread_rows([*shown, *said], (16, 4))]
    assert len(rows) == len(set(rows)) == sum(taken)
    assert sum(row.startswith("shown") for row in rows) == taken[0]
    if min(taken) == 10:
        assert {row.partition(":")[0] for row in rows[16:]} == {"shown", "said"}
        assert max(int(row.partition(":")[2]) for row in rows if row.startswith("shown")) >= 80
