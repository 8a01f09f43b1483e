"""Conversations as users had them: what was not stored is left out of a job, which goes on, and nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from noria.errors import Conflict, TrainingError
from noria.records import BLOB_SCHEME, Choice, Completion, Json, Side
from tests.unit.stages.material import write_data
from tests.unit.web import Web, serving
from train.daemon import Trainer, job_context
from train.data import calibration
from train.data.samples import image_part
from train.data.snapshot import judgement_id
from train.export.rendering import encode
from train.methods.policy_model import load_processor
from train.pipeline import learn, prepare
from train.pipeline.context import JobContext

DPO = {"epochs": 1, "batch_size": 4, "micro_batch_size": 2}
SETTINGS = {
    "dpo": DPO,
    "min_pairs": 2,
    "held_out": 0.0,
    "quantize": {"calibration_samples": 5},
    "verify": {"samples": 2},
}


def judged(trainer: Trainer, name: str, *parts: Any) -> None:
    """A question of these parts, answered twice; the first answer was chosen."""
    texts = (f"a {name} square", "no")
    choices = tuple(Choice(n, text, {"role": "assistant", "content": text}) for n, text in enumerate(texts))
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "what is it"}]}
    stored = Completion(name, 1.0, "noria", "v1", (asked,), {}, f"hash of {name}", choices)
    trainer.store.add_completions([stored])
    trainer.store.add_preference(Side(name, 0), Side(name, 1))


@pytest.fixture
def conversations(trainer: Trainer, tmp_path: Path) -> Any:
    """Three that can be read, one of them with a stored picture, and four that cannot; a web server has pictures."""
    data = write_data(tmp_path)
    picture = trainer.blobs.put((data / "1.png").read_bytes(), "image/png")
    with serving(data) as web:
        judged(trainer, "stored", image_part(BLOB_SCHEME + picture.sha256))
        judged(trainer, "text")
        judged(trainer, "plain", "a part that is a string")
        judged(trainer, "address", image_part(f"{web.url}/1.png"))
        judged(trainer, "path", image_part(str(data / "1.png")))
        judged(trainer, "both", image_part(BLOB_SCHEME + picture.sha256), image_part(f"{web.url}/2.png"))
        judged(trainer, "film", {"type": "video_url", "video_url": {"url": BLOB_SCHEME + picture.sha256}})
        yield web


def started(trainer: Trainer, method: str, settings: Json) -> JobContext:
    ctx = job_context(trainer, trainer.store.start_job(method, settings, "none", trainer.owner, 60.0))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx


def calibrating(ctx: JobContext) -> list[tuple[Json, int]]:
    """What the snapshot chose to calibrate on, all of which can be read, and how many pictures each shows."""
    chosen = prepare.snapshot_file(ctx)["samples"]["calibration"]
    pairs = {pair.preference_id: pair for pair in prepare.frozen_pairs(ctx, "train")}
    found = calibration.samples(chosen, pairs, ctx.store.get_completion, ctx.images, ctx.data_images)
    assert len(found) == len(chosen)
    return [(reference, len(sample.images)) for reference, sample in found]


def notes(ctx: JobContext) -> list[str]:
    return [event.data["message"] for event in ctx.store.events(ctx.job.id) if event.kind == "log"]


def test_a_job_leaves_out_what_it_cannot_read_and_trains_on_the_rest(trainer: Trainer, conversations: Web) -> None:
    ctx = started(trainer, "dpo", SETTINGS)
    ctx.done["snapshot"] = prepare.run(ctx)
    counts = ctx.done["snapshot"]["counts"]
    assert {name: count for name, count in counts.items() if count} == {"total": 7, "used": 3, "unreadable": 4}
    kept = prepare.frozen_pairs(ctx, "train")
    assert sorted(pair.prompt_hash for pair in kept) == ["hash of plain", "hash of stored", "hash of text"]
    told = learn.run(ctx)
    assert (told["pairs"], told["steps"]) == (3, 1)
    completions = {one["completion"] for one, _ in calibrating(ctx) if "completion" in one}
    assert completions
    assert completions <= {"stored", "text", "plain"}
    assert prepare.snapshot_file(ctx)["samples"]["unreadable"] == 4
    assert "4 recent conversations show what was not stored, and cannot calibrate" in notes(ctx)
    assert conversations.asked == []


def thumbed(trainer: Trainer, name: str, thumb: Literal["up", "down"], *parts: Any, reason: str = "stop") -> str:
    """A question of these parts, with one answer that somebody gave a thumb; the feedback's id."""
    answer = Choice(0, f"a {name} square", {"role": "assistant"}, finish_reason=reason)
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": f"what is {name}"}]}
    trainer.store.add_completions([Completion(name, 1.0, "noria", "v1", (asked,), {}, f"hash of {name}", (answer,))])
    return trainer.store.add_feedback(name, 0, thumb=thumb, annotator="u-1").id


def test_a_job_of_kto_trains_on_thumbs(trainer: Trainer, tmp_path: Path) -> None:
    """Unreadable ones are left out; good answers calibrate; what was used is not unused any more."""
    picture = trainer.blobs.put((write_data(tmp_path) / "1.png").read_bytes(), "image/png")
    shown = image_part(BLOB_SCHEME + picture.sha256)
    ups = [
        thumbed(trainer, "red", "up", shown),
        thumbed(trainer, "green", "up"),
        thumbed(trainer, "cut", "up", reason="length"),
    ]
    downs = [thumbed(trainer, "blue", "down", shown), thumbed(trainer, "grey", "down")]
    thumbed(trainer, "far", "up", image_part("https://x.org/a.png"))
    kto = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "beta": 0.5}
    ctx = started(trainer, "kto", {**SETTINGS, "kto": kto, "quantize": {"calibration_samples": 4}})
    ctx.done["snapshot"] = prepare.run(ctx)
    counts = ctx.done["snapshot"]["counts"]
    assert {name: count for name, count in counts.items() if count} == {"total": 6, "used": 5, "unreadable": 1}
    assert sorted(one.feedback_id for one in prepare.frozen_thumbs(ctx, "train")) == sorted(ups + downs)
    assert trainer.store.thumb_counts() == {"total": 6, "unused": 0}
    chosen = prepare.snapshot_file(ctx)["samples"]["calibration"]
    assert {one["feedback"] for one in chosen if "feedback" in one} <= set(ups)
    rows = {judgement_id(one): one for one in prepare.frozen_rows(ctx, "train")}
    found = calibration.samples(chosen, rows, ctx.store.get_completion, ctx.images, ctx.data_images)
    assert len(found) == len(chosen) == 4
    told = learn.run(ctx)
    assert {name: told[name] for name in ("steps", "answers", "up", "down")} == {
        "steps": 3,
        "answers": 5,
        "up": 3,
        "down": 2,
    }
    metrics = trainer.store.get_job(ctx.job.id).metrics
    assert (metrics["answers"], metrics["up"], metrics["down"]) == (5, 3, 2)
    lines = [json.loads(line) for line in (ctx.folder / "train" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert all("kl" in line for line in lines)
    assert (ctx.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_thumb_that_was_deleted_since_does_not_train(trainer: Trainer) -> None:
    gone, *_ = [thumbed(trainer, name, "up" if n else "down") for n, name in enumerate(("red", "green", "blue"))]
    ctx = started(trainer, "kto", {"kto": DPO, "min_pairs": 2, "held_out": 0.0})
    ctx.done["snapshot"] = prepare.run(ctx)
    trainer.store.delete_feedback(gone)
    assert len(prepare.frozen_thumbs(ctx, "train")) == 2
    assert "1 train thumbs of the snapshot were deleted since" in notes(ctx)


@pytest.mark.parametrize("thumb", ["up", "down"])
def test_thumbs_of_one_kind_alone_are_refused(trainer: Trainer, thumb: Literal["up", "down"]) -> None:
    for name in ("red", "green"):
        thumbed(trainer, name, thumb)
    ctx = started(trainer, "kto", {"min_pairs": 2, "held_out": 0.0})
    with pytest.raises(Conflict, match=rf"all 2 training answers have a thumb {thumb}") as refused:
        prepare.run(ctx)
    assert refused.value.code == "one_sided"


def test_too_few_thumbs_are_refused_with_numbers(trainer: Trainer) -> None:
    thumbed(trainer, "red", "up")
    ctx = started(trainer, "kto", {"min_pairs": 2, "held_out": 0.0})
    with pytest.raises(
        Conflict, match=r"too few thumbs: 1 unused ones make 1 training answers, 2 are needed"
    ) as refused:
        prepare.run(ctx)
    assert refused.value.code == "too_few_thumbs"


@pytest.mark.parametrize("method", ["simpo", "orpo", "cpo", "mpo"])
def test_a_job_of_every_pair_method_trains_on_preferences(trainer: Trainer, method: str) -> None:
    for name in ("red", "green", "blue"):
        judged(trainer, name)
    ctx = started(trainer, method, {method: DPO, "min_pairs": 2, "held_out": 0.0})
    ctx.done["snapshot"] = prepare.run(ctx)
    told = learn.run(ctx)
    assert (told["pairs"], told["steps"]) == (3, 1)
    assert trainer.store.get_job(ctx.job.id).metrics["pairs"] == 3


def test_a_recipe_gives_no_leave_to_fetch_what_users_sent(trainer: Trainer, conversations: Web, tmp_path: Path) -> None:
    """Its own rows name files, and these are read; captured messages that name one are left out."""
    rows = [{"source": str(tmp_path / "conversations.jsonl"), "count": 2}]
    figures = {"steps": 1, "batch_size": 2, "micro_batch_size": 1, "max_length": 256}
    asked = {"name": "tiny", "stages": [{"name": "talk", "kind": "sft", "data": rows, **figures}]}
    ctx = started(trainer, "recipe", {"recipe": asked, "quantize": SETTINGS["quantize"], "verify": SETTINGS["verify"]})
    ctx.done["snapshot"] = prepare.run(ctx)
    shown = {str(one.get("row") or one["completion"]): pictures for one, pictures in calibrating(ctx)}
    rows_shown = {name: pictures for name, pictures in shown.items() if "conversations.jsonl:" in name}
    assert sorted(rows_shown.values()) == [0, 1]
    assert shown == {**rows_shown, "stored": 1, "text": 0, "plain": 0}
    assert prepare.snapshot_file(ctx)["samples"]["unreadable"] == 4
    assert conversations.asked == []


def test_references_of_a_snapshot_that_was_frozen_before_are_judged_again(trainer: Trainer, conversations: Web) -> None:
    """A job that began under a release which did not look, and goes on under this one."""
    ctx = started(trainer, "dpo", SETTINGS)
    pairs = {pair.preference_id: pair for _, pair in trainer.store.training_pairs() if pair is not None}
    chosen = [{"completion": name} for name in ("address", "path", "both", "film", "stored")]
    chosen += [{"preference": one} for one in pairs]
    found = calibration.samples(chosen, pairs, ctx.store.get_completion, ctx.images, ctx.data_images)
    assert found[0][0] == {"completion": "stored"}
    assert [len(sample.images) for _, sample in found] == [1, 1, 0, 0]
    assert "http" not in json.dumps([sample.messages for _, sample in found])
    assert conversations.asked == []


def test_words_that_spell_a_placeholder_show_no_picture(trainer: Trainer, conversations: Web, tiny_vlm: Path) -> None:
    """In a question alone, beside a picture, and in an answer: the processor would look for a picture there."""
    picture = trainer.store.get_completion("stored").messages[0]["content"][0]
    judged(trainer, "spelt", "what is an <image>?")
    judged(trainer, "one too many", picture, "<image>")
    judged(trainer, "<image>")
    ctx = started(trainer, "dpo", SETTINGS)
    ctx.done["snapshot"] = prepare.run(ctx)
    counts = ctx.done["snapshot"]["counts"]
    assert {name: count for name, count in counts.items() if count} == {"total": 10, "used": 3, "unreadable": 7}
    assert learn.run(ctx)["pairs"] == 3
    names = [{"completion": name} for name in ("spelt", "one too many", "<image>", "stored", "text")]
    found = calibration.samples(names, {}, ctx.store.get_completion, ctx.images, ctx.data_images)
    encoded = [encode(load_processor(tiny_vlm), sample, 256) for _, sample in found]
    assert [one is None for one in encoded] == [True, True, True, False, False]


def users_thumb(trainer: Trainer, name: str, user: str) -> str:
    """As `thumbed`, of a conversation that is this end user's."""
    answer = Choice(0, f"a {name} square", {"role": "assistant"}, finish_reason="stop")
    asked = {"role": "user", "content": f"what is {name}"}
    one = Completion(name, 1.0, "noria", "v1", (asked,), {}, f"hash of {name}", (answer,), end_user=user)
    trainer.store.add_completions([one])
    return trainer.store.add_feedback(name, 0, thumb="down" if name == "blue" else "up").id


def test_a_user_who_is_forgotten_while_the_job_trains_is_not_in_its_weights(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learnt so far is thrown away; a second attempt, and one after a crash, have never read it."""
    from train.methods.preferences import method

    for name, user in (("red", "goes"), ("green", "stays"), ("blue", "stays"), ("grey", "stays")):
        users_thumb(trainer, name, user)
    kto = {"epochs": 1, "batch_size": 2, "micro_batch_size": 2}
    ctx = started(trainer, "kto", {**SETTINGS, "kto": kto, "quantize": {"calibration_samples": 8}})
    ctx.done["snapshot"] = prepare.run(ctx)
    assert "red" in trainer.store.uses(ctx.job.id)["calibration"] + trainer.store.uses(ctx.job.id)["verification"]
    learnt: list[int] = []
    train_method = method.train_method

    def forgetting(*args: Any, **more: Any) -> Any:
        learnt.append(len(args[2]))
        report = train_method(*args, **more)
        if len(learnt) == 1:
            told = trainer.store.forget_end_user("goes")["lineage"]
            assert [one["job"] for one in told["jobs"]] == [ctx.job.id]
            assert told["jobs"][0]["uses"]["train"] == 1
        return report

    monkeypatch.setattr(method, "train_method", forgetting)
    told = learn.run(ctx)
    assert learnt == [4, 3]
    assert told["answers"] == 3
    assert "train" not in trainer.store.forgotten_uses(ctx.job.id)
    again = (
        "1 of what the job was to learn from were forgotten with their end users; training begins again without them"
    )
    assert again in notes(ctx)
    trainer.store.forget_end_user("stays")
    with pytest.raises(TrainingError, match="every training row of the snapshot was deleted since"):
        learn.run(ctx)
    assert not (ctx.folder / "adapter").exists()
