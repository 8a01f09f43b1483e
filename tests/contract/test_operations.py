"""Jobs, versions, rollouts and status: the same through both doors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from noria.records import Json
from tests.contract.conftest import System, fake_system
from tests.contract.doors import Door, Refused, plain
from tests.contract.test_judgements import refusal_of, side

SETTINGS: Json = {"min_pairs": 1, "dpo": {"beta": 0.25}}


@pytest.fixture(scope="module")
def judged(system: System) -> None:
    """At least one training pair."""
    id_ = system.http.chat("big or small?", temperature=1, seed=5, n=2, max_tokens=8)["id"]
    system.http.prefer({"chosen": side(id_), "rejected": side(id_, 1)})


def ended(system: System, job: Json) -> Json:
    """The job, cancelled."""
    system.http.cancel(job["id"])
    return system.http.job(job["id"])


@pytest.mark.usefixtures("judged")
def test_a_job_is_queued_watched_and_cancelled(door: Door, other: Door) -> None:
    """The watcher sees the job's whole history, and its stream ends with the job."""
    job = door.retrain({"method": "dpo", "settings": SETTINGS, "rollout": "none"})
    assert [job["state"], job["stage"], job["method"], job["rollout"]] == ["queued", "snapshot", "dpo", "none"]
    assert job["settings"] == SETTINGS
    assert plain(other.job(job["id"])) == plain(job)
    assert plain(other.status()["job"]) == plain(job)
    seen: list[Json] = []
    watcher = threading.Thread(target=lambda: seen.extend(door.watch(job["id"])))
    watcher.start()
    assert other.cancel(job["id"])["state"] == "cancelled"
    watcher.join(30)
    assert not watcher.is_alive()
    assert [one["seq"] for one in seen] == list(range(1, len(seen) + 1))
    assert [one["data"]["state"] for one in seen] == ["queued", "cancelled"]
    assert plain(seen) == plain(list(other.watch(job["id"])))
    assert [one["seq"] for one in door.watch(job["id"], after=1)] == [2]
    assert list(door.watch(job["id"], after=2)) == []


@pytest.mark.usefixtures("judged")
def test_event_streams_say_when_there_is_no_more(system: System) -> None:
    """204 keeps an EventSource from coming back for ever."""
    job = ended(system, system.http.retrain({"settings": SETTINGS}))
    answer = system.http.client.get(f"/noria/v1/jobs/{job['id']}/events", headers={"last-event-id": "2"})
    assert (answer.status_code, answer.content) == (204, b"")
    bad = system.http.client.get(f"/noria/v1/jobs/{job['id']}/events", headers={"last-event-id": "x"})
    assert bad.status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"method": "ppo"}, "INVALID_ARGUMENT", "method"),
        ({"method": "simpo", "settings": {"dpo": {"beta": 1}}}, "INVALID_ARGUMENT", "settings.dpo"),
        ({"method": "kto", "settings": {"kto": {"gamma": 1}}}, "INVALID_ARGUMENT", "settings.kto.gamma"),
        ({"method": "kto", "settings": {"min_pairs": 5000}}, "FAILED_PRECONDITION", "settings.min_pairs"),
        ({"rollout": "canary"}, "INVALID_ARGUMENT", "rollout"),
        ({"settings": {"dpo": {"betta": 1}}}, "INVALID_ARGUMENT", "settings.dpo.betta"),
        ({"settings": {"dpo": {"beta": -1}}}, "INVALID_ARGUMENT", "settings.dpo.beta"),
        ({"settings": {"policy": {"automatic": False}}}, "INVALID_ARGUMENT", "settings.policy"),
        ({"settings": {"min_pairs": 5000}}, "FAILED_PRECONDITION", "settings.min_pairs"),
    ],
)
def test_a_wrong_job_is_refused_alike(system: System, body: Json, status: str, param: str) -> None:
    """Unknown method, unknown or impossible settings, too few preferences: each names what is at fault."""
    said = [refusal_of(door.retrain, body) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].param) == (status, param)


def test_a_bad_method_lists_the_good_ones(door: Door) -> None:
    """The refusal says what can be asked for now."""
    told = refusal_of(door.retrain, {"method": "ppo"}).message
    assert told.startswith("method: 'ppo' is not supported; supported now: dpo, simpo, orpo, cpo, kto, mpo")


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("method", ["simpo", "orpo", "cpo", "mpo"])
def test_every_pair_method_is_a_job(door: Door, other: Door, method: str) -> None:
    """With settings of its own, kept as they were asked."""
    settings = {"min_pairs": 1, "preferences": "all", method: {"beta": 0.25, "epochs": 2}}
    job = door.retrain({"method": method, "settings": settings, "rollout": "none"})
    assert [job["method"], job["settings"]] == [method, settings]
    assert other.cancel(job["id"])["state"] == "cancelled"


def test_thumbs_are_counted_and_kto_is_a_job(system: System, door: Door, other: Door) -> None:
    """One thumb more is one unused thumb more, on both doors."""
    before = plain(door.status()["thumbs"])
    id_ = system.http.chat("big or small?", temperature=1, seed=6, max_tokens=8)["id"]
    door.feedback({"completion_id": id_, "index": 0, "thumb": "up"})
    after = plain(other.status()["thumbs"])
    assert [after[name] - before.get(name, 0) for name in ("total", "unused")] == [1, 1]
    settings = {"min_pairs": 1, "kto": {"desirable_weight": 1.5}}
    job = door.retrain({"method": "kto", "settings": settings, "rollout": "none"})
    assert [job["method"], job["settings"]] == ["kto", settings]
    assert other.cancel(job["id"])["state"] == "cancelled"


def test_versions_are_the_same(system: System) -> None:
    """One version, live, with its manifest beside it."""
    http, grpc_ = system.http.versions(), system.grpc.versions()
    assert [one["id"] for one in http["data"]] == ["v1"]
    assert http["data"][0]["state"] == "live"
    assert plain(grpc_) == plain({key: value for key, value in http.items() if key != "object"})
    one = system.http.client.get("/noria/v1/versions/v1").json()
    assert one["manifest"]["id"] == "v1"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"version": "v99"}, "NOT_FOUND", "version"),
        ({"version": "v1"}, "FAILED_PRECONDITION", "version"),
        ({"version": "v1", "strategy": "canary", "percent": 10}, "INVALID_ARGUMENT", "strategy"),
        ({"version": "v1", "percent": 10}, "INVALID_ARGUMENT", "percent"),
    ],
)
def test_a_wrong_rollout_is_refused_alike(system: System, body: Json, status: str, param: str) -> None:
    """Unknown version, live already, a strategy of a later Noria."""
    said = [refusal_of(door.rollout, body) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].param) == (status, param)


def test_a_rollback_without_a_previous_version_says_why(system: System) -> None:
    """409 on HTTP, FAILED_PRECONDITION on gRPC."""
    said = [refusal(door.rollback) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].code) == ("FAILED_PRECONDITION", "no_previous_version")
    assert "v1 is the only one" in said[0].message


@pytest.mark.parametrize("call", ["job", "cancel", "watch"])
def test_an_unknown_job_is_refused_alike(system: System, call: str) -> None:
    """Also a stream refuses before it begins."""

    def ask(door: Door) -> Callable[[], Any]:
        if call == "watch":
            return lambda: list(door.watch("job_none"))
        return lambda: getattr(door, call)("job_none")

    said = [refusal(ask(door)) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].param) == ("NOT_FOUND", "job_id")


def test_status_is_the_same(system: System) -> None:
    """Live, serving, preferences, trainer; without a trainer it says so."""
    http, grpc_ = system.http.status(), system.grpc.status()
    assert [http["live"], http["serving"], http["previous"]] == ["v1", "v1", None]
    assert http["preferences"]["needed"] == 200
    assert http["trainer"]["alive"] is False
    assert "noria train" in http["trainer"]["idle_reason"]
    assert http["capture"]["dropped"] == 0
    assert [http["thumbs"]["needed"], http["method"]] == [200, "dpo"]
    for key in ("live", "serving", "fingerprint", "preferences", "thumbs", "method", "trainer"):
        assert plain(grpc_[key]) == plain(http[key])


def test_health_and_reflection(system: System) -> None:
    """The standard services answer."""
    channel = system.grpc.channel
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "noria.v1.InferenceService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    wanted = {f"noria.v1.{name}Service" for name in ("Inference", "Feedback", "Operator")}
    assert services >= wanted | {"grpc.health.v1.Health"}


def test_a_key_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With `server.api_key` set, calls without it are refused on both doors; health stays open."""
    with fake_system(tmp_path_factory.mktemp("keyed") / "home", api_key="secret") as keyed:
        assert keyed.http.status()["live"] == keyed.grpc.status()["live"] == "v1"
        for door in (keyed.http, keyed.grpc):
            del_key(door)
        said = [refusal(door.status) for door in (keyed.http, keyed.grpc)]
        assert said[0] == said[1]
        assert (said[0].status, said[0].code) == ("UNAUTHENTICATED", "invalid_api_key")
        stub = health_pb2_grpc.HealthStub(keyed.grpc.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
        with pytest.raises(grpc.RpcError):
            ProtoReflectionDescriptorDatabase(keyed.grpc.channel).get_services()


def del_key(door: Any) -> None:
    """Takes the key away from a door."""
    if door.name == "http":
        del door.client.headers["authorization"]
    else:
        del door._options["metadata"]


def refusal(call: Callable[[], Any]) -> Refused:
    """What the call is refused with."""
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(("method", "path"), [("GET", "/jbos"), ("PUT", "/jobs"), ("DELETE", "/versions/v1")])
def test_a_route_that_does_not_exist_is_refused_in_the_same_shape(system: System, method: str, path: str) -> None:
    answer = system.http.client.request(method, f"/noria/v1{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert answer.json()["error"]["message"] == f"{method} /noria/v1{path} is no route"
