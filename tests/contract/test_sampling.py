"""Sampling through both doors: the same groups, the same adapters, the same refusals.

The doors are the trainer's own (`noria.sampling.places`), so that its client and the wire are tested at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from noria.errors import Conflict, InvalidRequest, NoriaError, NotFound, Superseded, Unauthenticated, Unavailable
from noria.records import Json
from noria.sampling import Drawing, SamplingPool
from noria.sampling.places import Place, place_at
from noria.settings import GrpcSettings
from noria.v1 import sampling_pb2, sampling_pb2_grpc
from serve.engine.versions import ServingVersion, Trace
from tests.contract.doors import chat_body
from tests.contract.fake_system import FakeSystem
from tests.unit.sampling.adapters import write_adapter

WORDS: Json = {"messages": [{"role": "user", "content": "which colour?"}], "seed": 3}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSystem]:
    """A system over the fake engine, of this test alone."""
    system = FakeSystem(tmp_path / "home")
    system.start()
    yield system
    system.stop()


@pytest.fixture
def doors(fake: FakeSystem) -> Iterator[tuple[Place, Place]]:
    """HTTP and gRPC."""
    places = (place_at(f"http://127.0.0.1:{fake.http_port}"), place_at(f"grpc://127.0.0.1:{fake.grpc_port}"))
    yield places
    for place in places:
        place.close()


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, doors: tuple[Place, Place]) -> Place:
    """Each in turn."""
    return doors[request.param == "grpc"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder."""
    return write_adapter(tmp_path / "adapter")


def waited(condition: Any) -> bool:
    """Whether it comes true within five seconds."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_group_is_the_same_through_both_doors(doors: tuple[Place, Place], picture: bytes) -> None:
    """Prompt, tokens, log-probabilities, version; a picture as data: URL or bytes."""
    messages = chat_body("what is it?", picture)["messages"]
    said = [door.sample({"messages": messages, "n": 3, "max_tokens": 5, "seed": 7}) for door in doors]
    http, rpc = [{key: value for key, value in one.items() if key not in ("id", "created")} for one in said]
    assert http == rpc
    assert http["version"] == "v1" and http["fingerprint"].startswith("v1-") and http["adapter"] is None
    assert http["prompt_token_ids"][:4] == [1, 4, 4, 4]  # the picture's placeholder, expanded
    assert [one["index"] for one in http["samples"]] == [0, 1, 2]
    for one in http["samples"]:
        assert len(one["token_ids"]) == len(one["logprobs"]) == 5 and one["finish_reason"] == "length"
        assert one["text"] == " ".join(map(str, one["token_ids"]))
    assert len({tuple(one["token_ids"]) for one in http["samples"]}) == 3  # each with a seed of its own


def test_what_is_not_said_is_as_documented(door: Place) -> None:
    """n 1, temperature 1, everything kept, up to 256 tokens; the end of the turn is among the ids, not in the text."""
    group = door.sample(WORDS)
    (sample,) = group["samples"]
    assert sample["finish_reason"] == "stop" and sample["token_ids"][-1] == 2 and len(sample["token_ids"]) == 25
    assert not sample["text"].endswith(" 2")
    assert group["logprobs_temperature"] == 1.0
    assert sample["logprobs"] == [-token / 100 for token in sample["token_ids"]]


def test_an_adapter_is_put_used_listed_and_deleted(doors: tuple[Place, Place], adapter: Path, fake: FakeSystem) -> None:
    """Put through one door it is there for the other; its groups say so; after it is deleted nothing is left."""
    http, rpc = doors
    put = http.put_adapter("step-1", "v1", 60.0, adapter)
    assert (put["name"], put["version"], put["rank"], put["ttl_s"]) == ("step-1", "v1", 2, 60.0)
    assert time.time() < put["expires_at"] <= time.time() + 60
    again = rpc.put_adapter("step-1", "v1", 90.0, adapter)
    assert again["sha256"] == put["sha256"] and again["expires_at"] > put["expires_at"]
    assert [one["name"] for one in rpc.list_adapters()["data"]] == ["step-1"]
    base = rpc.sample(WORDS)
    group = rpc.sample({**WORDS, "adapter": "step-1"})
    assert group["adapter"] == "step-1" and base["adapter"] is None
    assert group["fingerprint"] == f"{base['fingerprint']}+step-1@{put['sha256'][:8]}"
    assert group["samples"][0]["token_ids"] != base["samples"][0]["token_ids"]
    assert group["samples"][0]["token_ids"] == http.sample({**WORDS, "adapter": "step-1"})["samples"][0]["token_ids"]
    assert http.delete_adapter("step-1")["deleted"] is True
    assert rpc.list_adapters()["data"] == [] and fake.engine.loaded == {}
    assert not [path for path in (fake.home / "adapters").rglob("*") if path.is_file()]
    with pytest.raises(NotFound) as gone:
        rpc.sample({**WORDS, "adapter": "step-1"})
    assert gone.value.code == "adapter_not_found"


def test_a_name_belongs_to_its_bytes(door: Place, adapter: Path, tmp_path: Path, fake: FakeSystem) -> None:
    """The same bytes may come again after they were deleted; other bytes never. The engine never sees a name twice."""
    other = write_adapter(tmp_path / "other", value=0.25)
    door.put_adapter("step-1", "v1", 60.0, adapter)
    door.delete_adapter("step-1")
    door.put_adapter("step-1", "v1", 60.0, adapter)
    with pytest.raises(Conflict) as refused:
        door.put_adapter("step-1", "v1", 60.0, other)
    assert refused.value.code == "adapter_name_used"
    assert len(fake.engine.names) == len(set(fake.engine.names)) == 2


def test_a_lease_ends(door: Place, adapter: Path, fake: FakeSystem) -> None:
    """Unused, the adapter goes by itself."""
    door.put_adapter("short", "v1", 0.01, adapter)
    assert waited(lambda: not fake.engine.loaded)
    assert door.list_adapters()["data"] == []


@pytest.mark.parametrize(
    ("name", "version", "kind", "code"),
    [
        ("step-1", "v0", Superseded, "version_changed"),
        ("../up", "v1", InvalidRequest, "invalid_request"),
        ("third", "v1", Conflict, "adapters_full"),
    ],
)
def test_uploads_that_are_refused(
    door: Place, adapter: Path, name: str, version: str, kind: type[NoriaError], code: str
) -> None:
    """Another base, a name that is a path, one adapter too many."""
    if name == "third":
        door.put_adapter("one", "v1", 60.0, adapter)
        door.put_adapter("two", "v1", 60.0, adapter)
    with pytest.raises((kind, NotFound)) as refused:  # HTTP has no route for a name with a slash in it
        door.put_adapter(name, version, 60.0, adapter)
    assert refused.value.code == code or isinstance(refused.value, NotFound)


def test_why_a_large_upload_was_refused_reaches_who_sent_it(door: Place, adapter: Path) -> None:
    """Also while it is still being sent."""
    (adapter / "adapter_model.safetensors").write_bytes(bytes(30 * 2**20))
    with pytest.raises(Superseded):
        door.put_adapter("step-1", "v0", 60.0, adapter)
    with pytest.raises(InvalidRequest, match="longer than the largest adapter"):
        door.put_adapter("step-1", "v1", 60.0, adapter)


def test_a_server_without_room_for_adapters_says_what_to_set(tmp_path: Path, adapter: Path) -> None:
    """The base is sampled all the same."""
    fake = FakeSystem(tmp_path / "home", adapters=0)
    fake.start()
    try:
        for address in (f"http://127.0.0.1:{fake.http_port}", f"grpc://127.0.0.1:{fake.grpc_port}"):
            place = place_at(address)
            with pytest.raises(Conflict, match=r"engine\.policy_adapters") as refused:
                place.put_adapter("step-1", "v1", 60.0, adapter)
            assert refused.value.code == "adapters_off"
            assert place.sample(WORDS)["version"] == "v1"
            place.close()
    finally:
        fake.stop()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({**WORDS, "n": 0}, "n"),
        ({**WORDS, "n": 2, "temperature": 0}, "body"),
        ({**WORDS, "temperature": 0.005}, "body"),
        ({**WORDS, "top_p": 0}, "top_p"),
        ({**WORDS, "max_tokens": 0}, "max_tokens"),
        ({**WORDS, "priority": 1}, "priority"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    ],
)
def test_requests_that_are_refused(door: Place, body: Json, param: str) -> None:
    """Each names its field; priority is ours."""
    with pytest.raises(InvalidRequest) as refused:
        door.sample(body)
    assert refused.value.param == param or "priority" in refused.value.message


def test_a_message_that_is_too_large_is_refused_and_not_asked_again(doors: tuple[Place, Place]) -> None:
    """gRPC has a limit; were the address taken for dead, a pool would ask for ever."""
    with pytest.raises(InvalidRequest, match="takes no such message"):
        doors[1].sample({"messages": [{"role": "user", "content": "x" * (GrpcSettings().max_message_mib * 2**20 + 1)}]})


def test_a_temperature_that_the_engine_cannot_tell_of_is_refused(door: Place, fake: FakeSystem) -> None:
    """Rather than a number that means something else."""
    assert door.sample({**WORDS, "temperature": 0.5})["logprobs_temperature"] == 0.5
    fake.engine.tempered = False
    with pytest.raises(NoriaError, match="temperature 1 only"):
        door.sample({**WORDS, "temperature": 0.5})
    assert door.sample({**WORDS, "temperature": 0})["logprobs_temperature"] == 1.0


def test_a_swap_ends_groups_and_mixes_nothing(
    doors: tuple[Place, Place], door: Place, adapter: Path, fake: FakeSystem
) -> None:
    """409 on HTTP and ABORTED on gRPC for the groups of the old version; its adapters are unloaded first."""
    door.put_adapter("step-1", "v1", 60.0, adapter)
    fake.engine.beat_s = 0.2
    turns = fake.sampling.turns
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(one.sample, {**WORDS, "n": 3, "adapter": "step-1"}) for one in doors]
        running.append(threads.submit(door.sample, WORDS))
        assert waited(lambda: turns.running + turns.waiting == 7)  # one that came later would be answered by v2
        fake.swap(ServingVersion("v2", "v2-00000002", fake.gate.current.path))
        for one in running:
            assert isinstance(one.exception(), Superseded)
    assert fake.engine.loaded == {} and fake.engine.running == {}
    assert door.list_adapters() == {**door.list_adapters(), "data": [], "version": "v2"}
    fake.engine.beat_s = 0.0
    with pytest.raises(NotFound):
        door.sample({**WORDS, "adapter": "step-1"})
    with pytest.raises(Superseded):
        door.sample({**WORDS, "version": "v1"})
    assert door.sample(WORDS)["version"] == "v2"


def test_the_statuses_on_the_wire(doors: tuple[Place, Place], fake: FakeSystem) -> None:
    """Another version is 409 and ABORTED, an unknown adapter 404 and NOT_FOUND, a broken upload 400."""
    url = f"http://127.0.0.1:{fake.http_port}/noria/v1"
    assert httpx.post(f"{url}/samples", json={**WORDS, "version": "v9"}).status_code == 409
    assert httpx.post(f"{url}/samples", json={**WORDS, "adapter": "none"}).status_code == 404
    assert httpx.put(f"{url}/adapters/a", params={"version": "v1"}, content=b"short").status_code == 400
    assert httpx.put(f"{url}/adapters/a", content=b"").status_code == 400  # no version
    endless = httpx.put(f"{url}/adapters/a", params={"version": "v1", "ttl_s": "nan"}, content=b"")
    assert (endless.status_code, endless.json()["error"]["param"]) == (400, "ttl_s")  # no lease would ever end
    answer = httpx.post(f"{url}/samples", json=WORDS)
    assert answer.headers["x-noria-model-version"] == "v1"
    with grpc.insecure_channel(f"127.0.0.1:{fake.grpc_port}") as channel:
        stub = sampling_pb2_grpc.SamplingServiceStub(channel)
        request = sampling_pb2.SampleGroupRequest(version="v9")
        request.messages.add(role="user", content="x")
        with pytest.raises(grpc.RpcError) as refused:
            stub.SampleGroup(request)
        assert refused.value.code() == grpc.StatusCode.ABORTED


def test_samples_are_no_traffic(doors: tuple[Place, Place], fake: FakeSystem) -> None:
    """Not captured, not in flight, not a model that a user could name."""
    fake.engine.beat_s = 0.1
    url = f"http://127.0.0.1:{fake.http_port}"
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(one.sample, WORDS) for one in doors]
        assert waited(lambda: len(fake.engine.running) == 2)
        assert httpx.get(f"{url}/noria/v1/status").json()["in_flight"] == 0
        for one in running:
            one.result()
    status = httpx.get(f"{url}/noria/v1/status").json()
    assert status["completions"] == 0 and status["capture"]["sent"] == 0


def test_users_take_the_engine_and_samples_go_on_afterwards(door: Place, fake: FakeSystem) -> None:
    """While a user's request is inside one sample runs; the others are set back, and lose no token."""
    fake.engine.beat_s = 0.1
    user = Trace("user", streaming=True)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(door.sample, {"messages": WORDS["messages"], "n": 4})
        assert waited(lambda: len(fake.engine.running) == 4)
        asyncio.run_coroutine_threadsafe(fake.gate.admit(user), fake._loop).result()
        assert waited(lambda: len(fake.engine.running) == 1)
        fake.engine.most_running = 0
        time.sleep(0.3)
        assert fake.engine.most_running <= 1
        fake._loop.call_soon_threadsafe(fake.gate.release, user)
        group = running.result()
    assert sorted(one["turns"] for one in group["samples"]) == [1, 2, 2, 2]
    for one in group["samples"]:
        assert len(one["token_ids"]) == 25 and one["token_ids"] == group["samples"][0]["token_ids"]
        assert one["logprobs"] == [-token / 100 for token in one["token_ids"]]
    assert fake.sampling.turns.set_back == 3


def test_a_caller_who_leaves_leaves_nothing_in_the_engine(fake: FakeSystem) -> None:
    """Over HTTP and over gRPC."""
    fake.engine.beat_s = 0.05
    url, grpc_at = f"http://127.0.0.1:{fake.http_port}", f"grpc://127.0.0.1:{fake.grpc_port}"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/noria/v1/samples", json={**WORDS, "n": 8}, timeout=0.2)
    assert waited(lambda: not fake.engine.running and fake.sampling.turns.waiting == 0)
    with pytest.raises(Unavailable):
        place_at(grpc_at, timeout_s=0.2).sample({**WORDS, "n": 8})
    assert waited(lambda: not fake.engine.running and fake.sampling.turns.waiting == 0)
    assert fake.sampling.counts.ended == fake.sampling.counts.groups == 2


def test_the_key_is_asked_for(tmp_path: Path) -> None:
    """By both doors."""
    fake = FakeSystem(tmp_path / "home", api_key="secret")
    fake.start()
    try:
        for address in (f"http://127.0.0.1:{fake.http_port}", f"grpc://127.0.0.1:{fake.grpc_port}"):
            with pytest.raises(Unauthenticated):
                place_at(address).sample(WORDS)
            assert place_at(address, api_key="secret").sample(WORDS)["version"] == "v1"
    finally:
        fake.stop()


def test_a_dead_engine_s_prompts_are_asked_elsewhere(tmp_path: Path, fake: FakeSystem, adapter: Path) -> None:
    """Two engines, one dies in the middle of its groups: every prompt is answered once; an engine that comes back is
    used again, the adapter put there again."""
    second = FakeSystem(tmp_path / "second")
    second.start()
    fake.engine.beat_s = second.engine.beat_s = 0.01
    prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(24)]
    addresses = [f"http://127.0.0.1:{fake.http_port}", f"grpc://127.0.0.1:{second.grpc_port}"]
    with SamplingPool(addresses, concurrency=2) as pool:
        pool.put_adapter("step-1", adapter, "v1")
        assert pool.list_adapters() == ["step-1"] and len(fake.engine.loaded) == len(second.engine.loaded) == 1
        killed = threading.Timer(0.4, lambda: second.stop())
        killed.start()
        groups = list(pool.sample(prompts, Drawing(n=2, max_tokens=20), adapter="step-1", version="v1"))
        killed.join()
        assert sorted(group.prompt for group in groups) == list(range(24))
        assert {group.address for group in groups} == set(addresses)
        assert all(len(group.samples) == 2 and group.adapter == "step-1" for group in groups)
        assert [member.failures > 0 for member in pool.members] == [False, True]
        asyncio.run_coroutine_threadsafe(fake.sampling.shelf.drop_all(), fake._loop).result()  # as after a restart
        groups = list(pool.sample(prompts[:4], Drawing(), adapter="step-1", version="v1"))
        assert len(groups) == 4 and {group.address for group in groups} == {addresses[0]}
        pool.delete_adapter("step-1")
        assert fake.engine.loaded == {}
