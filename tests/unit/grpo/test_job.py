"""GRPO as a job and as a stage of a recipe: what is frozen first, what is run, what the next stage gets."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from noria.errors import Conflict, SettingsError, TrainingError
from noria.records import Choice, Completion, Job, Json
from noria.registry import Base, ManifestDraft
from noria.settings import Settings
from noria.store import Store
from noria.tls import Trust
from tests.unit.grpo.sampler import TinySampler
from tests.unit.stages.material import write_data
from train.daemon import Trainer, job_context
from train.data import calibration, snapshot
from train.log import EventLog
from train.methods.delta import changed_modules, delta_folders
from train.methods.grpo import job as grpo_job
from train.pipeline import learn, prepare
from train.pipeline.context import JobContext
from train.pipeline.release import _draft
from train.stages.spec import read_steps

FIGURES: Json = {
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_tokens": 4,
    "max_divergence": 10.0,
    "wait_s": 5.0,
}
REPETITION = {
    "rewards": [{"name": "repetition", "n": 1, "unit": "characters"}, {"name": "length", "high": 2, "falloff": 4}]
}


class Pool(TinySampler):
    """The tiny sampler where the pipeline wants a pool; `made` are those that were opened."""

    made: list[Json]

    def close(self) -> None:
        """Notes it."""
        self.closed = True


@pytest.fixture
def trainer(tiny_vlm: Path, tmp_path: Path) -> Iterator[Trainer]:
    """A trainer over a home whose live version is the tiny model's."""
    told = {"nice": 0, "grpo": FIGURES, "reward": REPETITION, "held_out": 0.3}
    settings = Settings.model_validate({"home": tmp_path / "home", "train": told, "url": "http://there:1"})
    shutil.copytree(tiny_vlm, settings.masters_dir / "tiny")
    with Store.open(settings.store_url) as store:
        one = Trainer(settings, store, threading.Event(), EventLog(io.StringIO()))
        staging = one.registry.begin("test")
        shutil.copytree(tiny_vlm, staging / "serving")
        base = Base(name="tiny", path="masters/tiny")
        one.registry.promote(one.registry.publish(staging, ManifestDraft(method="base", base=base)).id)
        yield one


@pytest.fixture
def pool(tiny_vlm: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """What every job of the test samples with."""
    made = Pool(tiny_vlm)
    made.made = []

    def opened(addresses: Any, **more: Any) -> Pool:
        made.made.append({"addresses": tuple(addresses), **more})
        return made

    monkeypatch.setattr("noria.sampling.SamplingPool", opened)
    return made


def context(trainer: Trainer, job: Job) -> JobContext:
    return replace(job_context(trainer, job), check=lambda: None)


def started(trainer: Trainer, method: str, settings: Json) -> JobContext:
    ctx = context(trainer, trainer.store.start_job(method, settings, "none", trainer.owner, 60.0))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx


def ask(trainer: Trainer, number: int) -> Completion:
    """A captured conversation; every second one about a stored picture."""
    content: Any = f"question {number}"
    if number % 2:
        from PIL import Image

        sink = io.BytesIO()
        Image.new("RGB", (20 + number, 20), "red").save(sink, format="PNG")
        kept = trainer.blobs.put(sink.getvalue(), "image/png")
        shown = {"type": "image_url", "image_url": {"url": f"noria-blob:{kept.sha256}"}}
        content = [shown, {"type": "text", "text": content}]
    said = (Choice(0, "an answer", {"role": "assistant", "content": "an answer"}, finish_reason="stop"),)
    one = Completion(
        f"chatcmpl-{number}",
        float(number),
        "noria",
        "v1",
        ({"role": "user", "content": content},),
        {},
        f"hash{number}",
        said,
    )
    trainer.store.add_completions([one])
    return one


def test_a_job_learns_from_captured_conversations(trainer: Trainer, pool: Pool) -> None:
    kept = [ask(trainer, number) for number in range(12)]
    trainer.store.add_completions([replace(kept[0], id="chatcmpl-again", created_at=50.0)])
    held_out = {one.id for one in kept if snapshot.is_held_out(one.prompt_hash, 0.3)}
    assert 0 < len(held_out) < 8
    ctx = started(trainer, "grpo", {})
    ctx.done["snapshot"] = prepare.run(ctx)
    found = prepare.snapshot_file(ctx)
    (ids,) = found["prompts"]["captured"].values()
    assert len(ids) == 12 - len(held_out)  # each prompt once, those held out never
    assert not set(ids) & held_out
    assert ctx.done["snapshot"]["counts"] == {"0:captured": len(ids)}
    assert trainer.store.get_snapshot(found["id"]).train == ()
    told = learn.run(ctx)
    assert (told["steps"], told["answers"]) == (2, 16)
    made = {"addresses": ("http://there:1",), "api_key": None, "concurrency": 8, "give_up_s": 5.0}
    assert pool.made == [{**made, "trust": Trust()}]
    assert [name.rpartition("-")[2] for name in pool.names] == ["u0", "u1"]
    assert pool.names[0].startswith(f"{ctx.job.id}-a1-")
    assert (pool.loaded, pool.closed) == ({}, True)
    assert changed_modules(delta_folders(ctx.folder / "adapter")) == ("language_model",)
    asked = {json.dumps(group.messages) for group in pool.given}
    assert len(asked) == 4
    events = [event.data for event in trainer.store.events(ctx.job.id) if event.kind == "metrics"]
    assert [event["step"] for event in events if "step" in event] == [1, 2]
    assert {"loss", "reward", "reward/length", "kl", "divergence", "ratio_mean", "staleness"} <= set(events[0])
    metrics = trainer.store.get_job(ctx.job.id).metrics
    assert (metrics["steps"], metrics["answers"], metrics["waits"]) == (2, 16, 0)
    report = json.loads((ctx.folder / "train" / "report.json").read_text())
    assert sorted(report["frozen"]) == ["aligner", "vision_tower"]
    assert not list((ctx.folder / "train").glob("checkpoints"))
    assert learn.run(ctx) == json.loads(json.dumps(told))  # once


def test_what_a_manifest_says_of_it(trainer: Trainer, pool: Pool) -> None:
    for number in range(6):
        ask(trainer, number)
    ctx = started(trainer, "grpo", {"grpo": {"steps": 1}})
    ctx.done["snapshot"] = prepare.run(ctx)
    ctx.done["train"] = learn.run(ctx)
    ctx.done["quantize"] = {"frozen": {"vision_tower": "sha256:a", "aligner": "sha256:b"}, "quantization": {}}
    ctx.done["verify"] = {"mean_kl": 0.1}
    draft = _draft(ctx)
    settings = draft.model_dump()["settings"]
    assert (draft.method, draft.metrics["answers"], draft.metrics["mean_kl"]) == ("grpo", 8, 0.1)
    assert draft.metrics["reward_first"] == draft.metrics["reward_last"] > 0
    assert settings["grpo"]["steps"] == 1
    assert [one["name"] for one in settings["reward"]["rewards"]] == ["repetition", "length"]
    assert "dpo" not in settings


def test_what_users_delete_is_not_asked_and_what_they_ask_later_is_the_next_jobs(trainer: Trainer, pool: Pool) -> None:
    for number in range(8):
        ask(trainer, number)
    ctx = started(trainer, "grpo", {"held_out": 0.0})
    ctx.done["snapshot"] = prepare.run(ctx)
    trainer.store.delete_completion("chatcmpl-3")
    ask(trainer, 100)
    found = grpo_job.thaw_prompts(ctx, ctx.train.grpo, prepare.snapshot_file(ctx)["prompts"])
    ids = {one.source.removeprefix("captured:chatcmpl-") for one in found[0].prompts}
    assert ids == set("0124567")
    notes = [event.data["message"] for event in trainer.store.events(ctx.job.id) if event.kind == "log"]
    assert "1 of the job's prompts were deleted since" in notes


def test_the_store_knows_whose_prompts_a_job_asks(trainer: Trainer, pool: Pool) -> None:
    """So that forgetting them marks the job and its version; a job that has not trained asks without them."""
    for number in range(6):
        ask(trainer, number)
    theirs = replace(trainer.store.get_completion("chatcmpl-2"), id="chatcmpl-me", end_user="me", prompt_hash="mine")
    trainer.store.add_completions([theirs])
    ctx = started(trainer, "grpo", {"held_out": 0.0, "grpo": {"steps": 1}})
    ctx.done["snapshot"] = prepare.run(ctx)
    uses = trainer.store.uses(ctx.job.id)
    assert set(uses["prompts"]) == {"chatcmpl-me", *(f"chatcmpl-{number}" for number in range(6))}
    assert "chatcmpl-me" in uses["calibration"] + uses["verification"]
    lineage = trainer.store.forget_end_user("me")["lineage"]
    assert lineage["jobs"][0]["uses"]["prompts"] == 1
    learn.run(ctx)
    assert "prompts" not in trainer.store.forgotten_uses(ctx.job.id)
    notes = [event.data["message"] for event in trainer.store.events(ctx.job.id) if event.kind == "log"]
    assert (
        "1 of what the job was to learn from were forgotten with their end users; training begins without them" in notes
    )


def test_prompts_of_a_file_must_stay_as_they_were(trainer: Trainer, tmp_path: Path, pool: Pool) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "hi", "answer": "yes"}\n')
    ctx = started(trainer, "grpo", {"grpo": {"prompts": [{"source": str(path)}]}})
    ctx.done["snapshot"] = prepare.run(ctx)
    path.write_text('{"prompt": "ho", "answer": "yes"}\n')
    with pytest.raises(
        Conflict, match=r"the prompts are not those that the job began with: .*asked\.jsonl changed"
    ) as why:
        learn.run(ctx)
    assert why.value.code == "prompts_changed"
    assert pool.names == []


def test_a_conversation_that_is_gone_hides_no_file_that_has_changed(
    trainer: Trainer, tmp_path: Path, pool: Pool
) -> None:
    for number in range(4):
        ask(trainer, number)
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "hi", "answer": "yes"}\n')
    ctx = started(trainer, "grpo", {"grpo": {"prompts": [{"source": "captured"}, {"source": str(path)}]}})
    ctx.done["snapshot"] = prepare.run(ctx)
    frozen = prepare.snapshot_file(ctx)["prompts"]
    trainer.store.delete_completion(frozen["captured"]["0"][0])
    assert len(grpo_job.thaw_prompts(ctx, ctx.train.grpo, frozen)) == 2
    path.write_text('{"prompt": "ho", "answer": "yes"}\n')
    with pytest.raises(Conflict, match=r"began with: /.*asked\.jsonl changed since"):
        grpo_job.thaw_prompts(ctx, ctx.train.grpo, frozen)
    for id_ in frozen["captured"]["0"][1:]:
        trainer.store.delete_completion(id_)
    with pytest.raises(TrainingError, match="prompts of 'captured': there is none"):
        grpo_job.thaw_prompts(ctx, ctx.train.grpo, frozen)
    notes = [event.data["message"] for event in trainer.store.events(ctx.job.id) if event.kind == "log"]
    assert notes[-1] == f"{len(frozen['captured']['0'])} of the job's prompts were deleted since"


def test_right_answers_calibrate_and_verify(trainer: Trainer) -> None:
    asked = {"grpo": {"prompts": [{"source": "scenes", "count": 12}]}, "quantize": {"calibration_samples": 6}}
    ctx = started(trainer, "grpo", {**asked, "verify": {"samples": 3}})
    prepare.run(ctx)
    chosen = prepare.snapshot_file(ctx)["samples"]
    assert (len(chosen["calibration"]), len(chosen["verification"])) == (6, 3)
    assert chosen["verified_on_calibration"] is False
    found = calibration.samples(chosen["calibration"], {}, ctx.store.get_completion, ctx.images, ctx.data_images)
    assert all(sample.images and sample.messages[-1]["role"] == "assistant" for _, sample in found)


@pytest.mark.parametrize(
    ("settings", "kind", "why"),
    [
        ({"reward": {"rewards": []}}, SettingsError, r"train\.reward\.rewards is empty"),
        ({"modules": {"aligner": "lora"}}, SettingsError, r"train\.modules\.aligner\.policy='lora' contradicts GRPO"),
        ({}, TrainingError, "prompts of 'captured': there is none"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is(
    trainer: Trainer, settings: Json, kind: type[Exception], why: str
) -> None:
    with pytest.raises(kind, match=why):
        prepare.run(started(trainer, "grpo", settings))


def recipe(data: Path, method: str, *stages: Json) -> Json:
    figures = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 256}
    rate = {"language_model": {"rank": 4, "alpha": 8, "learning_rate": 2e-3}}
    source = [{"source": str(data / "preferences.jsonl")}]
    prefer = {"name": "prefer", "kind": method, "data": source, "modules": rate, **figures}
    return {"name": "both", "stages": [prefer, *stages]}


PLAY: Json = {
    "name": "play",
    "kind": "grpo",
    "grpo": {key: value for key, value in FIGURES.items() if key != "wait_s"}
    | {"prompts": [{"source": "scenes", "count": 8}]},
    "reward": {"rewards": [{"name": "length", "high": 2, "falloff": 4}]},
}


@pytest.mark.parametrize(("method", "rows"), [("dpo", 12), ("orpo", 12), ("kto", 24)])
def test_preferences_then_groups_in_one_job(
    trainer: Trainer, pool: Pool, tmp_path: Path, method: str, rows: int
) -> None:
    """The engine holds nothing of the first stage: its LoRA is in the adapter, so the ratio is 1 from the start."""
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data")
    ctx = started(trainer, "recipe", {"recipe": recipe(data, method, PLAY)})
    ctx.done["snapshot"] = prepare.run(ctx)
    assert ctx.done["snapshot"]["counts"] == {"prefer": rows, "play": 8}
    learn.run(ctx)
    deltas = delta_folders(ctx.folder / "adapter")
    assert [path.name for path in deltas] == ["01-prefer", "02-play"]
    assert [changed_modules([path]) for path in deltas] == [("language_model",)] * 2
    steps = read_steps(ctx.folder / "train" / "02-play" / "log.jsonl")
    assert [step.metrics["ratio_max"] for step in steps] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert steps[0].metrics["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference has the stage before
    assert pool.names[0].startswith(f"{ctx.job.id}-a1-play-")
    assert pool.loaded == {}
    report = json.loads((ctx.folder / "train" / "report.json").read_text())
    assert report["stages"][0]["kind"] == method
    told = report["stages"][1]
    assert (told["name"], told["kind"], told["steps"], told["task"]["answers"]) == ("play", "grpo", 2, 16)
    assert told["data"]["sha256"] == prepare.snapshot_file(ctx)["data"]["play"]
    assert {"reward", "kl"} <= set(told["curve"][0])
    assert told["settings"]["grpo"]["prompts"] == [{"source": "scenes", "count": 8}]
    known = [one.get("row") for one in prepare.snapshot_file(ctx)["samples"]["calibration"]]
    assert all(row.startswith("scene:") for row in known)  # of the last stage that knows answers


def test_a_stage_that_the_engine_cannot_follow_is_told(trainer: Trainer, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data")
    figures = {"steps": 1, "batch_size": 4, "micro_batch_size": 2, "max_length": 256}
    talk = {"name": "talk", "kind": "sft", "data": [{"source": str(data / "conversations.jsonl")}], **figures}
    ctx = started(trainer, "recipe", {"recipe": {"name": "odd", "stages": [talk, PLAY]}})
    with pytest.raises(
        Conflict, match=r"stage 'talk' trains the aligner \(full\), which no adapter .* stage 'play'"
    ) as why:
        prepare.run(ctx)
    assert why.value.code == "not_an_adapter"


def test_a_stage_without_a_reward_takes_ours_or_none(trainer: Trainer, tmp_path: Path) -> None:
    plain = {key: value for key, value in PLAY.items() if key != "reward"}
    ctx = started(trainer, "recipe", {"recipe": {"name": "one", "stages": [plain]}})
    assert prepare.run(ctx)["counts"] == {"play": 8}
    trainer.store.finish_job(ctx.job.id, trainer.owner, "cancelled")
    ctx = started(trainer, "recipe", {"recipe": {"name": "one", "stages": [plain]}, "reward": {"rewards": []}})
    with pytest.raises(SettingsError, match=r"stages\.play\.reward\.rewards is empty, and train\.reward\.rewards too"):
        prepare.run(ctx)
