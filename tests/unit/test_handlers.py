"""The handlers over a real store, with a gate and a capture queue small enough to look into."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from noria.blobs import Blobs
from noria.errors import Conflict, InvalidRequest, NoriaError, NotFound, SettingsError, Unavailable
from noria.records import Choice, Completion, Image, Json, ProcessInfo, Side, Snapshot
from noria.registry import ManifestDraft, Registry
from noria.settings import Settings
from noria.store import Store
from serve.api import http, judgements
from serve.api.handlers import Handlers


@dataclass(frozen=True)
class Loaded:
    """The version that the engine has."""

    id: str = "v1"
    fingerprint: str = "v1-00000000"


@dataclass
class FixedGate:
    """A gate with nothing behind it."""

    current: Loaded = field(default_factory=Loaded)
    in_flight: int = 3


@dataclass
class CountingCapture:
    """A capture queue that notes what was flushed; `hangs` never answers."""

    sent: int = 5
    stored: int = 4
    dropped: int = 1
    hangs: bool = False
    flushed: list[str | None] = field(default_factory=list)

    async def flush(self, completion_id: str | None = None) -> None:
        """Notes the call."""
        self.flushed.append(completion_id)
        if self.hangs:
            await asyncio.Event().wait()


@dataclass
class Bench:
    """Handlers with everything behind them in reach."""

    store: Store
    blobs: Blobs
    registry: Registry
    gate: FixedGate
    capture: CountingCapture
    handlers: Handlers

    def answer(self, id_: str, *texts: str, prompt: str = "p", user: str | None = None) -> str:
        """A stored completion with these choices."""
        choices = tuple(Choice(i, text, {"role": "assistant", "content": text}) for i, text in enumerate(texts))
        messages = ({"role": "user", "content": prompt},)
        made = Completion(id_, 1.0, "noria", "v1", messages, {}, prompt, choices, end_user=user)
        self.store.add_completions([made])
        return id_

    def pair(self, id_: str) -> None:
        """A training pair."""
        self.answer(id_, "good", "bad")
        self.store.add_preference(Side(id_, 0), Side(id_, 1))

    def publish(self) -> str:
        """Another version."""
        staging = self.registry.begin()
        (staging / "probe.json").write_text("{}")
        return self.registry.publish(staging, ManifestDraft(method="base")).id


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Handlers over an empty home with one live version."""
    settings = Settings.model_validate({"home": tmp_path, "train": {"min_pairs": 2}})
    with Store.open(settings.store_url) as store:
        blobs, registry = Blobs(settings.blobs_url), Registry(settings.models_dir, store)
        gate, capture = FixedGate(), CountingCapture()
        handlers = Handlers(store=store, registry=registry, blobs=blobs, gate=gate, capture=capture, settings=settings)
        made = Bench(store, blobs, registry, gate, capture, handlers)
        registry.promote(made.publish())
        yield made


async def refusal(awaitable: Any) -> NoriaError:
    """What the call raises."""
    with pytest.raises(NoriaError) as caught:
        await awaitable
    return caught.value


async def test_a_preference_waits_for_the_answers_commit(bench: Bench) -> None:
    """Only what it names is flushed, and then it is stored."""
    bench.answer("c1", "a", "b")
    body = {"chosen": {"completion_id": "c1", "index": 0}, "rejected": {"completion_id": "c1", "index": 1}}
    first, created = await bench.handlers.record_preference(body)
    assert created
    assert bench.capture.flushed == ["c1"]
    assert bench.store.get_preference(first["id"]).to_wire() == first
    again, created = await bench.handlers.record_preference(body)
    assert (again["id"], created) == (first["id"], False)


async def test_a_store_that_hangs_is_told_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets 503 instead of waiting for ever."""
    monkeypatch.setattr(judgements, "FLUSH_S", 0.01)
    bench.capture.hangs = True
    error = await refusal(bench.handlers.record_feedback({"completion_id": "c1", "index": 0, "rating": 5}))
    assert isinstance(error, Unavailable)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ([1], "body", "the body must be a JSON object"),
        ({"chosen": {"text": "a"}}, "rejected", "rejected: Field required"),
        ({"chosen": {}, "rejected": {"text": "b"}}, "chosen", "chosen: give either completion_id and index, or text"),
        (
            {"chosen": {"completion_id": "c1"}, "rejected": {"text": "b"}},
            "chosen",
            "chosen: completion_id and index belong together",
        ),
        (
            {"chosen": {"text": "a", "tekst": "b"}, "rejected": {"text": "b"}},
            "chosen.tekst",
            "chosen.tekst: unknown field",
        ),
    ],
)
async def test_a_broken_preference_names_the_field(bench: Bench, body: Any, param: str, message: str) -> None:
    """Before the store is asked."""
    error = await refusal(bench.handlers.record_preference(body))
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.message) == (param, message)
    assert bench.capture.flushed == []


async def test_a_job_keeps_the_overrides_and_takes_the_policys_defaults(bench: Bench) -> None:
    """What is stored is what was asked; the rest is for the trainer to resolve."""
    for id_ in ("c1", "c2"):
        bench.pair(id_)
    job = await bench.handlers.create_job({"settings": {"dpo": {"beta": 0.5}}})
    assert (job["method"], job["rollout"], job["state"], job["reason"]) == ("dpo", "direct", "queued", "operator")
    assert bench.store.get_job(job["id"]).settings == {"dpo": {"beta": 0.5}}


async def test_too_few_pairs_are_refused_with_numbers(bench: Bench) -> None:
    """Unless the job's own settings ask for fewer."""
    bench.pair("c1")
    error = await refusal(bench.handlers.create_job({}))
    assert isinstance(error, Conflict)
    assert error.code == "too_few_preferences"
    assert error.message.startswith("1 unused training pairs are stored and a job needs at least 2 (train.min_pairs)")
    assert (await bench.handlers.create_job({"settings": {"min_pairs": 1}}))["state"] == "queued"


async def test_a_second_job_waits_for_the_first_ones_snapshot(bench: Bench) -> None:
    """The first will take every unused pair; a job that trains on all of them again may queue behind it."""
    for id_ in ("c1", "c2"):
        bench.pair(id_)
    first = await bench.handlers.create_job({})
    error = await refusal(bench.handlers.create_job({}))
    assert isinstance(error, Conflict)
    assert (error.code, error.param) == ("preferences_taken", "settings.preferences")
    assert error.message.startswith(f"job {first['id']} is queued and has not taken its snapshot yet")
    bench.store.claim_job("trainer", 60)
    assert "is running and has not" in (await refusal(bench.handlers.create_job({}))).message
    assert (await bench.handlers.create_job({"settings": {"preferences": "all"}}))["state"] == "queued"


async def test_used_pairs_count_only_when_asked_for(bench: Bench) -> None:
    """`preferences = "all"` trains on what a job has learnt from before."""
    for id_ in ("c1", "c2"):
        bench.pair(id_)
    used = bench.store.create_job("dpo")
    bench.store.claim_job("trainer", 60)
    ids = tuple(one.id for one in bench.store.list_preferences())
    bench.store.add_snapshot(Snapshot("snap_1", used.id, 1.0, ids, (), {}))
    bench.store.finish_job(used.id, "trainer", "succeeded")
    assert (await refusal(bench.handlers.create_job({}))).code == "too_few_preferences"
    assert (await bench.handlers.create_job({"settings": {"preferences": "all"}}))["state"] == "queued"


async def test_a_job_refuses_what_it_cannot_do(bench: Bench) -> None:
    """Each refusal names the field and what is right."""
    error = await refusal(bench.handlers.create_job({"method": "ppo"}))
    assert error.param == "method"
    assert error.message.startswith("method: 'ppo' is not supported; supported now: dpo, simpo, orpo, cpo, kto, mpo")
    error = await refusal(bench.handlers.create_job({"rollout": "canary"}))
    assert error.message == "rollout: 'canary' is not supported; supported now: none, direct"
    error = await refusal(bench.handlers.create_job({"settings": {"dpo": {"betta": 1}}}))
    assert isinstance(error, SettingsError)
    assert error.param == "settings.dpo.betta"
    error = await refusal(bench.handlers.create_job({"method": "simpo", "settings": {"dpo": {"beta": 0.2}}}))
    assert isinstance(error, SettingsError)
    assert error.param == "settings.dpo"
    assert error.message == (
        "settings.dpo would be ignored: method='simpo' reads settings.simpo; drop it, or ask for method='dpo'"
    )
    unfit = {"dpo": {"loss_type": "hinge", "label_smoothing": 0.1}}
    error = await refusal(bench.handlers.create_job({"settings": unfit}))
    assert "dpo.label_smoothing=0.1 would be ignored: dpo.loss_type='hinge'" in error.message
    error = await refusal(bench.handlers.create_job({"settings": {"poll_s": 3}}))
    assert error.param == "settings.poll_s"
    assert bench.store.list_jobs() == []


async def test_each_method_has_its_own_settings(bench: Bench) -> None:
    for id_ in ("c1", "c2"):
        bench.pair(id_)
    for method, own in (("simpo", {"gamma": 0.5}), ("orpo", {"beta": 0.2}), ("cpo", {}), ("mpo", {"beta": 0.3})):
        asked = {method: own, "preferences": "all"}
        job = await bench.handlers.create_job({"method": method, "settings": asked})
        assert (job["method"], job["settings"]) == (method, asked)


async def test_kto_counts_thumbs_and_leaves_preferences_to_the_others(bench: Bench) -> None:
    """Too few are refused with numbers; a job that waits takes what its own method reads."""
    for id_ in ("c1", "c2"):
        bench.pair(id_)
    error = await refusal(bench.handlers.create_job({"method": "kto"}))
    assert (type(error), error.code, error.param) == (Conflict, "too_few_thumbs", "settings.min_pairs")
    assert error.message.startswith("0 unused answers with a thumb are stored and a job needs at least 2")
    bench.store.add_feedback("c1", 0, thumb="up")
    bench.store.add_feedback("c2", 0, thumb="down")
    assert (await bench.handlers.create_job({}))["method"] == "dpo"
    assert (await bench.handlers.create_job({"method": "kto"}))["state"] == "queued"
    error = await refusal(bench.handlers.create_job({"method": "kto"}))
    assert "it will take the unused thumbs" in error.message
    status = await bench.handlers.status()
    assert (status["thumbs"], status["method"]) == ({"total": 2, "unused": 2, "needed": 200}, "dpo")


async def test_an_ended_job_cannot_be_cancelled(bench: Bench) -> None:
    """A cancelled one can, again: nothing changes."""
    job = bench.store.create_job("dpo")
    bench.store.claim_job("trainer", 60)
    bench.store.finish_job(job.id, "trainer", "succeeded", version="v2")
    error = await refusal(bench.handlers.cancel_job(job.id))
    assert isinstance(error, Conflict)
    waiting = bench.store.create_job("dpo")
    assert (await bench.handlers.cancel_job(waiting.id))["state"] == "cancelled"
    assert (await bench.handlers.cancel_job(waiting.id))["state"] == "cancelled"


async def test_watching_sees_every_event_once_and_ends_with_the_job(bench: Bench) -> None:
    """Also those written between two looks."""
    job = bench.store.create_job("dpo")
    events = await bench.handlers.watch_job(job.id)
    first = await anext(events)
    assert (first["seq"], first["data"]["state"]) == (1, "queued")
    bench.store.claim_job("trainer", 60)
    bench.store.set_progress(job.id, "trainer", stage="train", progress=0.5, metrics={"loss": 0.25})
    bench.store.finish_job(job.id, "trainer", "failed", error={"message": "no"})
    rest = [event async for event in events]
    assert [one["seq"] for one in rest] == [2, 3, 4]
    assert rest[1]["data"]["metrics"] == {"loss": 0.25}
    assert rest[2]["data"]["state"] == "failed"
    with pytest.raises(NotFound):
        await bench.handlers.watch_job("job_none")


async def test_a_quiet_event_stream_is_kept_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments between events; closing it ends the watching inside."""
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.01)
    job = bench.store.create_job("dpo")
    events = await bench.handlers.watch_job(job.id)
    lines = http.server_sent(None, events)
    first = await anext(lines)
    while first.startswith(":"):
        first = await anext(lines)
    assert first.startswith('id: 1\nevent: state\ndata: {"job_id": "job_')
    assert await anext(lines) == ": keep-alive\n\n"
    await lines.aclose()
    await asyncio.sleep(0)
    assert [event async for event in events] == []


async def test_rollouts_and_rollback(bench: Bench) -> None:
    """One at a time; back means to what was live before."""
    error = await refusal(bench.handlers.rollback())
    assert (error.code, "v1" in error.message) == ("no_previous_version", True)
    second = bench.publish()
    rollout = await bench.handlers.create_rollout({"version": second})
    assert (rollout["state"], rollout["version"], rollout["previous"]) == ("queued", "v2", "v1")
    assert isinstance(await refusal(bench.handlers.create_rollout({"version": second})), Conflict)
    bench.store.promote(second, rollout["id"])
    bench.gate.current = Loaded("v2", "v2-00000000")
    assert (await refusal(bench.handlers.create_rollout({"version": "v2"}))).code == "already_live"
    back = await bench.handlers.rollback()
    assert (back["version"], back["previous"]) == ("v1", "v2")
    assert [one["id"] for one in (await bench.handlers.list_rollouts({}))["data"]] == [back["id"], rollout["id"]]
    assert (await bench.handlers.get_rollout(rollout["id"]))["state"] == "succeeded"


async def test_status_says_why_nothing_trains(bench: Bench) -> None:
    """The trainer's own reason once it is alive."""
    bench.pair("c1")
    status = await bench.handlers.status()
    assert (status["live"], status["serving"], status["previous"], status["in_flight"]) == ("v1", "v1", None, 3)
    assert status["preferences"] == {"total": 1, "unused": 1, "needed": 200}
    assert status["capture"] == {"sent": 5, "stored": 4, "dropped": 1}
    assert (status["completions"], status["job"], status["rollout"]) == (1, None, None)
    assert status["trainer"]["alive"] is False
    bench.store.beat(ProcessInfo("t", "trainer", bench.store._now(), {"idle_reason": "199 more preferences"}))
    assert (await bench.handlers.status())["trainer"] == {"alive": True, "idle_reason": "199 more preferences"}


async def test_pages_are_cut_by_id(bench: Bench) -> None:
    """Newest first, `after` the last one seen; an id that is not there is refused."""
    for _ in range(3):
        bench.publish()
    first = await bench.handlers.list_versions({"limit": "2"})
    assert [one["id"] for one in first["data"]] == ["v4", "v3"]
    assert (first["first_id"], first["last_id"], first["has_more"]) == ("v4", "v3", True)
    second = await bench.handlers.list_versions({"limit": "2", "after": "v3"})
    assert ([one["id"] for one in second["data"]], second["has_more"]) == (["v2", "v1"], False)
    empty = await bench.handlers.list_versions({"after": "v1"})
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert (await refusal(bench.handlers.list_versions({"after": "v9"}))).param == "after"
    assert (await refusal(bench.handlers.list_versions({"limit": "101"}))).param == "limit"
    assert (await refusal(bench.handlers.list_jobs({"state": "lost"}))).param == "state"


async def test_forgetting_deletes_the_pictures_too(bench: Bench) -> None:
    """Those that nothing else refers to."""
    picture = bench.blobs.put(b"not really a picture", "image/png")
    shared = bench.blobs.put(b"shared", "image/png")
    messages: tuple[Json, ...] = ({"role": "user", "content": "p"},)
    choices = (Choice(0, "a", {"role": "assistant", "content": "a"}),)

    def completion(id_: str, user: str, *images: Image) -> Completion:
        return Completion(id_, 1.0, "noria", "v1", messages, {}, "p", choices, images=images, end_user=user)

    bench.store.add_completions([completion("c1", "u-1", picture, shared), completion("c2", "u-2", shared)])
    gone = await bench.handlers.forget_end_user("u-1")
    assert bench.capture.flushed == [None]
    assert (gone["completions"], gone["images"]) == (1, 1)
    assert not bench.blobs.exists(picture.sha256)
    assert bench.blobs.exists(shared.sha256)
