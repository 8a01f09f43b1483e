"""Keys and roles at both doors: who is let in, who is not and why, and what is written down of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sqlalchemy import text as sql

from noria.access.keys import ROLES
from noria.client import NoriaClient
from noria.errors import Forbidden, Unauthenticated
from noria.records import Json
from noria.sampling import Drawing, SamplingPool
from noria.sampling.places import place_at
from noria.settings import Settings
from noria.store import Store
from serve.access.roles import OPEN_PATHS
from tests.contract.doors import Door, GrpcDoor, HttpDoor, Refused, plain
from tests.contract.fake_system import FakeSystem
from tests.contract.test_judgements import side
from tests.unit.sampling.adapters import write_adapter

WORDS: Json = {"messages": [{"role": "user", "content": "which colour?"}], "n": 2}
ALLOWED = {
    "chat": "client",
    "stream": "client",
    "prefer": "annotator operator",
    "feedback": "annotator operator",
    "preferences": "annotator operator",
    "retrain": "operator",
    "cancel": "operator",
    "watch": "operator",
    "versions": "operator",
    "rollout": "operator",
    "rollback": "operator",
    "status": "operator",
    "forget": "operator",
}


@dataclass
class Keyed:
    """A running server whose store has a key for each role, and one with all of them."""

    fake: FakeSystem
    store: Store
    keys: dict[str, str]

    @property
    def url(self) -> str:
        """HTTP's address."""
        return f"http://127.0.0.1:{self.fake.http_port}"

    @property
    def grpc_at(self) -> str:
        """gRPC's address."""
        return f"127.0.0.1:{self.fake.grpc_port}"

    def door(self, name: str, key: str | None) -> Any:
        """A door with that key."""
        return HttpDoor(self.url, key) if name == "http" else GrpcDoor(self.grpc_at, key)

    def doors(self, key: str | None) -> list[Any]:
        """Both."""
        return [self.door(name, key) for name in ("http", "grpc")]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """The server, shared."""
    home = tmp_path_factory.mktemp("keyed") / "home"
    home.mkdir()
    with Store.open(Settings(home=home).store_url) as store:
        keys: dict[str, str] = {role: store.create_key(role, [role])[1] for role in ROLES}
        keys["all"] = store.create_key("all", list(ROLES))[1]
        fake = FakeSystem(home)
        fake.start()
        try:
            yield Keyed(fake, store, keys)
        finally:
            fake.stop()


def refusal(call: Callable[[], Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


def waited(call: Callable[..., bool], *arguments: Any) -> bool:
    """Whether it comes true within some seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if call(*arguments):
            return True
        time.sleep(0.02)
    return False


def lets_in(door: Door) -> bool:
    try:
        door.status()
    except Refused as error:
        assert error.status == "UNAUTHENTICATED"
        return False
    return True


def keeps_out(door: Door) -> bool:
    return not lets_in(door)


def calls(door: Door, completion: str) -> dict[str, Callable[[], Any]]:
    """Each call of a door, with something in it that gets as far as a handler."""
    judged = {"chosen": side(completion), "rejected": side(completion, 1)}
    return {
        "chat": lambda: door.chat("hello"),
        "stream": lambda: list(door.stream("hello")),
        "prefer": lambda: door.prefer(judged),
        "feedback": lambda: door.feedback({"completion_id": completion, "index": 0, "rating": 5}),
        "preferences": lambda: door.preferences(),
        "retrain": lambda: door.retrain({"method": "no such"}),
        "cancel": lambda: door.cancel("job_none"),
        "watch": lambda: list(door.watch("job_none")),
        "versions": lambda: door.versions(),
        "rollout": lambda: door.rollout({"version": "v99"}),
        "rollback": lambda: door.rollback(),
        "status": lambda: door.status(),
        "forget": lambda: door.forget("nobody"),
    }


@pytest.mark.parametrize("name", ["http", "grpc"])
@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_do_what_the_table_says_and_nothing_else(keyed: Keyed, role: str, name: str) -> None:
    completion = keyed.door("http", keyed.keys["all"]).chat("which?", n=2, temperature=1)["id"]
    for call, ask in calls(keyed.door(name, keyed.keys[role]), completion).items():
        try:
            ask()
            error = None
        except Refused as refused:
            error = refused
        allowed = role in ALLOWED[call].split()
        assert (error is None or error.status != "PERMISSION_DENIED") == allowed, (call, error)
        if error is not None and not allowed:
            assert (error.type, error.code) == ("permission_error", "forbidden")
            needs = " or ".join(ALLOWED[call].split())
            assert error.message == f"This call needs the role {needs}; the key {role!r} has {role}."


def test_without_the_right_key_both_doors_say_the_same(keyed: Keyed) -> None:
    shop = keyed.store.create_key("wrong", ["operator"])[1]
    for key in (None, "nonsense", shop[:-1] + ("0" if shop[-1] != "0" else "1"), f"noria-{'0' * 16}-{'0' * 64}"):
        for call in ALLOWED:
            said = [refusal(calls(door, "chatcmpl-none")[call]) for door in keyed.doors(key)]
            assert said[0] == said[1]
            assert (said[0].status, said[0].code) == ("UNAUTHENTICATED", "invalid_api_key")
            assert key is None or key not in said[0].message
    answer = keyed.door("http", None).client.get("/noria/v1/status")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_without_a_key_nothing_is_read(keyed: Keyed) -> None:
    """gRPC's refusal comes before the message; a probe's body takes none of the room that bodies have."""

    def never() -> Iterator[bytes]:
        time.sleep(20)
        yield b""

    with grpc.insecure_channel(keyed.grpc_at) as channel:
        for method in ("InferenceService/CreateChatCompletion", "InferenceService/StreamChatCompletion", "No/Such"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.stream_unary(f"/noria.v1.{method}")(never(), timeout=15)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        probe = channel.stream_unary("/grpc.health.v1.Health/Check")
        held = [probe.future(never(), timeout=15) for _ in range(40)]
        asked = health_pb2.HealthCheckRequest(service="noria.v1.FeedbackService")
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(asked, timeout=15).status == next(stub.Watch(asked, timeout=15)).status == 1
        for method in ("Check", "Watch"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.stream_unary(f"/grpc.health.v1.Health/{method}")(never(), timeout=15)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert {one.code() for one in held} == {grpc.StatusCode.INVALID_ARGUMENT}
    for path in OPEN_PATHS:
        with socket.create_connection(("127.0.0.1", keyed.fake.http_port), timeout=15) as one:
            one.sendall(f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 60000000\r\n\r\n{{".encode())
            assert one.recv(9) == b"HTTP/1.1 "  # it does not wait for the rest
            assert keyed.fake.limits.load.body_bytes == 0


def test_a_trainer_key_samples_and_another_does_not(keyed: Keyed, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    for address in (keyed.url, f"grpc://{keyed.grpc_at}"):
        with SamplingPool([address], api_key=keyed.keys["trainer"]) as pool:
            pool.put_adapter("step-1", adapter, pool.version())
            (group,) = pool.sample([WORDS["messages"]], Drawing(n=2), adapter="step-1")
            assert len(group.samples) == 2 and group.error is None
            assert pool.list_adapters() == ["step-1"]
            pool.delete_adapter("step-1")
        for key, error in ((keyed.keys["client"], Forbidden), (None, Unauthenticated)):
            place = place_at(address, api_key=key)
            for ask in (
                place.list_adapters,
                partial(place.sample, WORDS),
                partial(place.put_adapter, "step-2", "v1", 60.0, adapter),  # a stream of messages
                partial(place.delete_adapter, "step-1"),
            ):
                with pytest.raises(error):
                    ask()


def test_a_key_ends_when_it_expires_or_is_revoked(keyed: Keyed) -> None:
    _, short = keyed.store.create_key("short", ["operator"], expires_at=time.time() + 1.0)
    _, long = keyed.store.create_key("long", ["operator"])
    for door in keyed.doors(long):
        assert waited(lets_in, door)  # a server that runs sees new keys
    for door in keyed.doors(short):
        assert waited(keeps_out, door)
        assert refusal(door.status).code == "key_expired"
    keyed.store.revoke_key("long")
    for door in keyed.doors(long):
        assert waited(keeps_out, door)
        assert refusal(door.status).code == "key_revoked"


def test_a_rotated_key_is_taken_with_both_secrets_for_the_overlap(keyed: Keyed) -> None:
    made, old = keyed.store.create_key("turned", ["operator"])
    _, new = keyed.store.rotate_key("turned", 3600.0)
    for door in [*keyed.doors(new), *keyed.doors(old)]:
        assert waited(lets_in, door)
    _, newest = keyed.store.rotate_key("turned")
    for door in keyed.doors(newest):
        assert waited(lets_in, door)
    for door in [*keyed.doors(new), *keyed.doors(old)]:
        assert waited(keeps_out, door)
    assert waited(lambda: keyed.store.get_key(made.id).last_used_at is not None)


def test_a_client_has_its_own_completions_and_no_others(keyed: Keyed) -> None:
    """Asked over either wire, whole or streamed: what is stored names the key, so the caller was known inside."""
    other = keyed.store.create_key("other client", ["client"])[1]
    mine, theirs = keyed.door("http", keyed.keys["client"]), keyed.door("http", other)
    assert waited(lambda: theirs.client.get("/v1/models").status_code == 404)  # let in; the fake has no such route
    asked = [theirs.chat("mine?")["id"], keyed.door("grpc", other).chat("mine too?")["id"]]
    for door in keyed.doors(other):
        asked.append(next(iter(list(door.stream("and this?"))))["id"])
    seen = [theirs.client.get(f"/v1/chat/completions/{id_}").status_code for id_ in asked]
    assert seen == [200] * 4
    key = keyed.store.get_key("other client").id
    assert {keyed.store.get_completion(id_).key_id for id_ in asked} == {key}
    listed = theirs.client.get("/v1/chat/completions", params={"limit": 100}).json()["data"]
    assert sorted(one["id"] for one in listed) == sorted(asked)
    path = f"/v1/chat/completions/{asked[0]}"
    for method, body in (("GET", None), ("POST", {"metadata": {"a": "b"}}), ("DELETE", None)):
        refused = mine.client.request(method, path, json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found_error")
    assert mine.client.get(f"{path}/messages").status_code == 404
    annotator = keyed.door("http", keyed.keys["annotator"]).client
    assert annotator.get(path).status_code == 200 and annotator.delete(path).status_code == 403
    assert annotator.get("/v1/chat/completions", params={"limit": 100}).json()["data"] != listed
    assert theirs.client.post(path, json={"metadata": {"a": "b"}}).json()["metadata"] == {"a": "b"}
    assert theirs.client.delete(path).json()["deleted"]
    assert keyed.door("http", keyed.keys["operator"]).client.delete(f"/v1/chat/completions/{asked[1]}").is_success


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_what_operators_do_is_written_down(keyed: Keyed, name: str) -> None:
    made, key = keyed.store.create_key(f"boss over {name}", ["operator", "annotator"])
    door = keyed.door(name, key)
    assert waited(lambda: lets_in(door))
    completion = keyed.door("http", keyed.keys["client"]).chat(name, n=2, temperature=1)["id"]
    door.prefer({"chosen": side(completion), "rejected": side(completion, 1)})
    job = door.retrain({"settings": {"min_pairs": 1}, "rollout": "none"})["id"]
    door.cancel(job)
    for call in (lambda: door.cancel("job_none"), lambda: door.retrain({"method": "no such"}), door.rollback):
        refusal(call)
    refusal(lambda: door.rollout({"version": "v99"}))
    door.forget("nobody")
    door.status()
    refusal(lambda: door.chat("not mine to ask"))
    expected = [
        ("create_job", job, "ok"),
        ("cancel_job", job, "ok"),
        ("cancel_job", "job_none", "not_found"),
        ("create_job", None, "invalid_request"),
        ("rollback", None, "no_previous_version"),
        ("create_rollout", "v99", "not_found"),
        ("forget_end_user", None, "ok"),
    ]
    kept = keyed.store.list_audit_events(key_id=made.id, order="asc", limit=100)
    assert [(one.action, one.target, one.result) for one in kept] == expected
    assert {(one.name, one.wire) for one in kept} == {(made.name, name)}
    assert [one.at for one in kept] == sorted(one.at for one in kept)


def test_a_client_fills_no_log_with_what_does_not_exist(keyed: Keyed) -> None:
    """What it deletes of its own stands there; what it only tried does not."""
    made, key = keyed.store.create_key("deleter", ["client"])
    http = HttpDoor(keyed.url, key)
    assert waited(lambda: http.client.get("/noria/v1/limits").status_code == 200)
    own = http.chat("mine", store=True)["id"]
    answers = [http.client.delete(f"/v1/chat/completions/{id_}").status_code for id_ in ("chatcmpl-none", own, own)]
    assert answers == [404, 200, 404]
    kept = keyed.store.list_audit_events(key_id=made.id, order="asc", limit=100)
    assert [(one.action, one.target, one.result) for one in kept] == [("delete_completion", own, "ok")]


def test_the_audit_log_is_the_same_through_both_doors(keyed: Keyed) -> None:
    http, rpc = keyed.doors(keyed.keys["operator"])
    for door in (http, rpc):
        refusal(partial(door.cancel, "job_none"))
    query = {"limit": 1, "action": "cancel_job", "key_id": keyed.store.get_key("operator").id}
    one, other = http.audit(**query), rpc.audit(**query)
    assert one["object"] == "list" and one["has_more"] and one["data"][0]["wire"] == "grpc"
    assert plain(other) == plain({key: value for key, value in one.items() if key != "object"})
    nexts = [door.audit(after=one["last_id"], **query) for door in (http, rpc)]
    assert [page["data"][0]["wire"] for page in nexts] == ["http", "http"]
    said = [refusal(partial(door.audit, after="audit_none")) for door in (http, rpc)]
    assert said[0] == said[1] and said[0].status == "NOT_FOUND"
    with NoriaClient(keyed.url, api_key=keyed.keys["operator"]) as client:
        assert [row["id"] for row in client.audit_events(limit=1, action="cancel_job")] == [one["data"][0]["id"]]


def test_a_store_without_its_keys_shuts_both_doors(keyed: Keyed) -> None:
    doors = keyed.doors(keyed.keys["operator"])
    with keyed.store._db.write() as conn:
        conn.execute(sql("ALTER TABLE api_keys RENAME TO elsewhere"))
    try:
        for door in doors:
            assert waited(_answers, door, "UNAVAILABLE")
            assert refusal(door.status).code == "keys_unavailable"
        anonymous = keyed.door("http", None).client.get("/noria/v1/status")
        assert (anonymous.status_code, anonymous.json()["error"]["code"]) == (503, "keys_unavailable")
    finally:
        with keyed.store._db.write() as conn:
            conn.execute(sql("ALTER TABLE elsewhere RENAME TO api_keys"))
    for door in doors:
        assert waited(_answers, door, "OK")


def _answers(door: Door, status: str) -> bool:
    try:
        door.status()
    except Refused as error:
        return error.status == status
    return status == "OK"


def test_any_key_may_look_at_the_protos(keyed: Keyed) -> None:
    """A stream of both sides, answered by a generator."""
    stub = reflection_pb2_grpc.ServerReflectionStub(grpc.insecure_channel(keyed.grpc_at))
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    with pytest.raises(grpc.RpcError) as told:
        list(stub.ServerReflectionInfo(iter(asked), timeout=10))
    assert told.value.code() == grpc.StatusCode.UNAUTHENTICATED
    metadata = (("authorization", f"Bearer {keyed.keys['annotator']}"),)
    (answer,) = stub.ServerReflectionInfo(iter(asked), timeout=10, metadata=metadata)
    assert "noria.v1.FeedbackService" in [one.name for one in answer.list_services_response.service]


def test_the_first_key_shuts_a_server_that_runs(tmp_path: Path) -> None:
    fake = FakeSystem(tmp_path / "home")
    fake.start()
    try:
        doors: list[Door] = [
            HttpDoor(f"http://127.0.0.1:{fake.http_port}", "demo"),
            GrpcDoor(f"127.0.0.1:{fake.grpc_port}"),
        ]
        assert [lets_in(door) for door in doors] == [True, True]
        with Store.open(Settings(home=tmp_path / "home").store_url) as store:
            store.create_key("first", ["operator"])
            store.revoke_key("first")
            for door in doors:
                assert waited(keeps_out, door)
            assert store.list_audit_events() == []
    finally:
        fake.stop()
