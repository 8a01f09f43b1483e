"""The pool over small places, and the messages of its two wires."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from noria.errors import Conflict, InvalidRequest, NoriaError, NotFound, Superseded, Unavailable
from noria.records import Json
from noria.sampling import Drawing, Group, SamplingPool
from noria.sampling import pool as pool_module
from noria.sampling.messages import as_json, sample_request
from noria.sampling.places import place_at
from noria.v1 import sampling_pb2
from serve.api.grpc.sampling import request_to_body

PROMPTS: list[list[Json]] = [[{"role": "user", "content": str(number)}] for number in range(8)]
FOLDER = Path("nowhere")


class FakePlace:
    """A place that answers, unless `fault` has an error for the call: `sample`, `put`, `delete`, `list`."""

    def __init__(self, address: str, version: str = "v1") -> None:
        self.address, self.version = address, version
        self.faults: dict[str, NoriaError] = {}
        self.adapters: set[str] = set()
        self.puts = 0
        self.asked: list[str] = []
        self.lock = threading.Lock()
        self.before: Callable[[], None] = lambda: None

    def put_adapter(self, name: str, version: str, ttl_s: float, folder: Path) -> Json:
        """Keeps it."""
        self._fail("put")
        if version != self.version:
            raise Superseded(f"{self.version} serves")
        self.puts += 1
        self.adapters.add(name)
        return {"name": name}

    def delete_adapter(self, name: str) -> Json:
        """Forgets it."""
        self._fail("delete")
        if name not in self.adapters:
            raise NotFound("none", code="adapter_not_found")
        self.adapters.remove(name)
        return {"deleted": True}

    def list_adapters(self) -> Json:
        """All of them."""
        self._fail("list")
        return {"data": [{"name": name} for name in sorted(self.adapters)], "version": self.version}

    def sample(self, body: Json) -> Json:
        """One sample of two tokens."""
        self.before()
        self._fail("sample")
        words = body["messages"][0]["content"]
        with self.lock:
            self.asked.append(words)
        if body.get("version") not in (None, self.version):
            raise Superseded(f"{self.version} serves")
        if body.get("adapter") not in (None, *self.adapters):
            raise NotFound("no adapter", code="adapter_not_found")
        if words == "too long":
            raise InvalidRequest("too long", param="messages")
        sample = {"index": 0, "text": words, "token_ids": [1, 2], "logprobs": [-0.5, -1.0], "finish_reason": "stop"}
        told = {"id": "sample-1", "version": self.version, "fingerprint": "v1-1", "adapter": body.get("adapter")}
        return {**told, "prompt_token_ids": [7], "logprobs_temperature": 1.0, "samples": [{**sample, "turns": 1}]}

    def close(self) -> None:
        """Nothing to close."""

    def _fail(self, call: str) -> None:
        if call in self.faults:
            raise self.faults[call]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a test's length."""
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(pool_module, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(pool_module, "LOOK_S", 0.005)


@pytest.fixture
def places() -> list[FakePlace]:
    """Three of them."""
    return [FakePlace(address) for address in "abc"]


def pool_of(places: Sequence[FakePlace], **more: float) -> SamplingPool:
    """A pool over the places."""
    by_address = {place.address: place for place in places}
    return SamplingPool(list(by_address), concurrency=2, connect=by_address.__getitem__, **more)  # type: ignore[arg-type]


def all_at_once(places: Sequence[FakePlace]) -> None:
    """Has the first calls wait for each other: both threads of every place have then taken a prompt."""
    meet = threading.Barrier(2 * len(places), timeout=10)
    first = iter(range(2 * len(places)))

    def before() -> None:
        if next(first, None) is not None:
            meet.wait()

    for place in places:
        place.before = before


def asked(groups: Sequence[Group]) -> list[int]:
    """Which prompts have a group."""
    return sorted(group.prompt for group in groups)


def test_every_prompt_has_one_group_and_all_places_work(places: list[FakePlace]) -> None:
    all_at_once(places)
    groups = list(pool_of(places).sample(PROMPTS, Drawing()))
    assert asked(groups) == list(range(8))
    assert {group.address for group in groups} == {"a", "b", "c"}
    assert all(group.samples[0].text == str(group.prompt) for group in groups)
    assert groups[0].samples[0].logprobs == (-0.5, -1.0) and groups[0].messages == tuple(PROMPTS[groups[0].prompt])


def test_a_dead_place_is_skipped_and_used_again(places: list[FakePlace]) -> None:
    a, b, _ = places
    b.faults["sample"] = Unavailable("gone")
    pool = pool_of([a, b])
    all_at_once([a, b])
    assert asked(list(pool.sample(PROMPTS, Drawing()))) == list(range(8))
    assert set(a.asked) == {str(number) for number in range(8)} and b.asked == []
    assert pool.members[1].asked_again >= 1 and pool.members[1].failures >= 1
    a.faults, b.faults = {"sample": Unavailable("now a")}, {}
    assert {group.address for group in pool.sample(PROMPTS, Drawing())} == {"b"}
    assert pool.members[1].failures == 0


def test_with_nobody_there_it_gives_up_after_a_while(places: list[FakePlace]) -> None:
    for place in places:
        place.faults["sample"] = Unavailable(f"{place.address} is gone")
    with pytest.raises(Unavailable, match="a is gone; b is gone; c is gone") as raised:
        list(pool_of(places, give_up_s=0.2).sample(PROMPTS, Drawing()))
    assert raised.value.code == "no_sampling_engine"


def test_an_adapter_is_put_everywhere_and_again_where_it_is_missing(places: list[FakePlace]) -> None:
    a, b, _ = places
    b.faults["put"] = Unavailable("not up yet")
    pool = pool_of([a, b])
    pool.put_adapter("step", FOLDER, "v1")
    assert (a.puts, b.puts) == (1, 0)
    b.faults.clear()
    a.adapters.clear()  # it was restarted
    all_at_once([a, b])
    groups = list(pool.sample(PROMPTS, Drawing(), adapter="step", version="v1"))
    assert asked(groups) == list(range(8)) and {group.adapter for group in groups} == {"step"}
    assert a.puts == 2  # once more, though two threads of it missed it
    assert pool.list_adapters() == ["step"]
    a.faults["delete"] = Unavailable("gone")
    pool.delete_adapter("step")
    pool.delete_adapter("step")
    assert b.adapters == set()
    a.adapters.clear()
    with pytest.raises(NotFound):
        list(pool.sample(PROMPTS, Drawing(), adapter="step"))  # it is not the pool's any more


def test_what_could_not_be_deleted_is_before_the_next_one_is_put(places: list[FakePlace]) -> None:
    a, b, _ = places
    pool = pool_of([a, b])
    pool.put_adapter("step-1", FOLDER, "v1")
    a.faults["delete"] = Unavailable("a moment")
    pool.delete_adapter("step-1")
    assert (a.adapters, b.adapters) == ({"step-1"}, set())
    pool.put_adapter("step-2", FOLDER, "v1")
    assert (a.adapters, b.adapters) == ({"step-1"}, {"step-2"})  # a still is not there
    a.faults.clear()
    all_at_once([a, b])
    assert asked(list(pool.sample(PROMPTS, Drawing(), adapter="step-2", version="v1"))) == list(range(8))
    assert (a.adapters, b.adapters) == ({"step-2"}, {"step-2"})


def test_a_place_that_is_full_is_skipped_while_another_is_not(places: list[FakePlace]) -> None:
    a, b, _ = places
    full = Conflict("x is loaded", code="adapters_full")
    a.faults["put"] = full
    pool = pool_of([a, b])
    pool.put_adapter("step", FOLDER, "v1")
    groups = list(pool.sample(PROMPTS, Drawing(), adapter="step", version="v1"))
    assert asked(groups) == list(range(8)) and {group.address for group in groups} == {"b"}
    b.faults["put"] = full
    with pytest.raises(Conflict, match="x is loaded"):
        pool.put_adapter("next", FOLDER, "v1")


def test_another_version_is_an_error_only_where_all_have_it(places: list[FakePlace]) -> None:
    a, b, _ = places
    b.version = "v2"
    pool = pool_of([a, b])
    pool.put_adapter("step", FOLDER, "v1")
    groups = list(pool.sample(PROMPTS, Drawing(), adapter="step", version="v1"))
    assert asked(groups) == list(range(8)) and {group.address for group in groups} == {"a"}
    a.version = "v2"
    with pytest.raises(Superseded):
        list(pool.sample(PROMPTS, Drawing(), version="v1"))
    with pytest.raises(Superseded):
        pool.put_adapter("next", FOLDER, "v1")
    assert pool.version() == "v2"
    a.version = b.version = "v1"  # rolled back; what was said before counts no more
    a.before = b.before = lambda: time.sleep(0.05)
    assert asked(list(pool.sample(PROMPTS[:2], Drawing(), version="v1"))) == [0, 1]


def test_what_an_address_refuses_is_raised(places: list[FakePlace]) -> None:
    pool = pool_of(places)
    places[1].faults["put"] = Conflict("adapters are off", code="adapters_off")
    with pytest.raises(Conflict, match="adapters are off"):
        pool.put_adapter("step", FOLDER, "v1")
    places[2].faults["sample"] = places[0].faults["sample"] = Conflict("no")
    places[1].faults["sample"] = Conflict("no")
    with pytest.raises(Conflict, match="no"):
        list(pool.sample(PROMPTS, Drawing()))


def test_a_refused_prompt_is_a_group_with_an_error(places: list[FakePlace]) -> None:
    prompts = [*PROMPTS, [{"role": "user", "content": "too long"}]]
    groups = list(pool_of(places).sample(prompts, Drawing()))
    assert asked(groups) == list(range(9))
    assert [(group.error, group.samples) for group in groups if group.prompt == 8] == [("too long", ())]


def test_prompts_are_taken_as_they_are_needed_and_their_errors_are_raised(places: list[FakePlace]) -> None:
    taken: list[int] = []

    def endless() -> Iterator[list[Json]]:
        for number in range(10**6):
            taken.append(number)
            if number == 500:
                raise RuntimeError("the data ended badly")
            yield PROMPTS[0]

    groups = pool_of(places).sample(endless(), Drawing())
    assert [next(groups).samples[0].text for _ in range(3)] == ["0"] * 3
    time.sleep(0.05)
    assert len(taken) < 100
    with pytest.raises(RuntimeError, match="ended badly"):
        list(groups)
    before = threading.active_count()
    stopped = pool_of(places).sample(iter(PROMPTS * 100), Drawing())
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    for _ in range(200):
        if threading.active_count() <= before:
            break
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_address_has_a_scheme() -> None:
    for address in ("127.0.0.1:8000", "ftp://x", "grpc://", "grpcs://", ""):
        with pytest.raises(InvalidRequest, match="http://host:port or grpc://host:port"):
            place_at(address)
    with pytest.raises(InvalidRequest, match="at least one"):
        SamplingPool([])


def test_a_body_is_the_same_after_the_wire() -> None:
    """What gRPC carries is what HTTP would have said; a picture's bytes are its data: URL again."""
    png = "data:image/png;base64,iVBORw0KGgo="
    body: Json = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": png, "detail": "low"}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "x", "tool_call_id": "1"},
            {"role": "user", "content": [{"type": "text", "text": "and?"}, {"type": "text", "text": "so?"}]},
        ],
        "n": 4,
        "temperature": 0.0,
        "top_k": 0,
        "seed": 2**40,
        "adapter": "step",
    }
    assert request_to_body(sample_request({**body, "version": None})) == body
    for wrong in ("data:image/png,abc", "data:image/png;base64,@@"):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": wrong}}]}
        with pytest.raises(InvalidRequest):
            sample_request({"messages": [message]})
    for part in ("words", {"type": "text"}, {"type": "image_url", "image_url": "https://x/y.png"}, {"type": "video"}):
        with pytest.raises(InvalidRequest, match=r"messages\.0\.content\.0: a part is text or image_url"):
            sample_request({"messages": [{"role": "user", "content": [part]}]})
    with pytest.raises(InvalidRequest, match=r"messages\.0: a message is an object"):
        sample_request({"messages": ["hi"]})
    with pytest.raises(InvalidRequest, match="no such field"):
        sample_request({"messages": [{"role": "user", "content": "x", "weight": 1}]})
    with pytest.raises(InvalidRequest):
        sample_request({"messages": [{"role": "user", "content": "x"}], "priority": 1})


def test_an_answer_shows_what_is_not_set_too() -> None:
    told = as_json(sampling_pb2.SampleGroupResponse(samples=[sampling_pb2.Sample(token_ids=[1])]))
    assert told["adapter"] is None and told["prompt_token_ids"] == []
    assert told["samples"][0] == {
        "index": 0,
        "text": "",
        "token_ids": [1],
        "logprobs": [],
        "finish_reason": "",
        "turns": 0,
    }
