"""Jobs: one runs at a time, leases are taken over, and every change is told as an event."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from noria.errors import Conflict, InvalidRequest, LeaseLost, NotFound
from noria.records import Job
from noria.store import Store
from tests.unit.store.conftest import Clock


def running(store: Store, owner: str = "a", lease_s: float = 60) -> Job:
    """A fresh job that `owner` runs."""
    made = store.create_job("dpo", {"dpo": {"beta": 0.2}}, "direct")
    job = store.claim_job(owner, lease_s)
    assert job is not None
    assert job.id == made.id
    return job


def test_a_job_is_queued_then_claimed(store: Store, clock: Clock) -> None:
    made = store.create_job("dpo", {"dpo": {"beta": 0.2}}, "direct", "min_preferences")
    assert (made.state, made.stage, made.progress, made.attempt) == ("queued", "snapshot", 0.0, 0)
    assert store.get_job(made.id) == made
    clock.now = 1010.0
    job = store.claim_job("a", 60)
    assert job is not None
    assert (job.state, job.owner, job.attempt, job.lease_until, job.started_at) == ("running", "a", 1, 1070.0, 1010.0)
    assert (job.settings, job.rollout, job.reason) == ({"dpo": {"beta": 0.2}}, "direct", "min_preferences")


def test_one_job_runs_at_a_time_and_the_oldest_goes_first(store: Store) -> None:
    first, second = store.create_job("dpo", {}, "none", "operator"), store.create_job("dpo")
    assert store.claim_job("a", 60) == store.get_job(first.id)
    assert store.claim_job("a", 60) is None
    assert store.claim_job("b", 60) is None
    store.finish_job(first.id, "a", "failed", error={"message": "no"})
    job = store.claim_job("b", 60)
    assert job is not None
    assert job.id == second.id
    assert [one.id for one in store.list_jobs()] == [second.id, first.id]
    assert [one.id for one in store.list_jobs(state="failed")] == [first.id]
    assert [one.id for one in store.list_jobs(limit=1)] == [second.id]


def test_a_job_can_start_as_its_makers_when_no_other_is_open(store: Store, clock: Clock) -> None:
    job = store.start_job("recipe", {"recipe": {"name": "a"}}, "direct", "a", 60)
    assert (job.state, job.owner, job.attempt, job.lease_until) == ("running", "a", 1, clock.now + 60)
    assert (job.method, job.settings, job.rollout) == ("recipe", {"recipe": {"name": "a"}}, "direct")
    assert [event.data["state"] for event in store.events(job.id)] == ["queued", "running"]
    with pytest.raises(Conflict, match=rf"job {job.id} \(recipe\) is running, and one job runs at a time"):
        store.start_job("recipe", {}, "none", "b", 60)
    clock.now += 61
    with pytest.raises(Conflict, match=rf"job {job.id} \(recipe\) was left by its trainer"):
        store.start_job("recipe", {}, "none", "b", 60)
    store.request_cancel(job.id)
    waiting = store.create_job("dpo")
    with pytest.raises(Conflict, match=rf"job {waiting.id} \(dpo\) is queued"):
        store.start_job("recipe", {}, "none", "b", 60)
    assert [one.id for one in store.list_jobs()] == [waiting.id, job.id]


def test_a_dead_trainers_job_goes_on_with_its_finished_stages(store: Store, clock: Clock) -> None:
    job = running(store)
    store.finish_stage(job.id, "a", "snapshot", {"snapshot": "snap_1"})
    store.set_progress(job.id, "a", stage="train", progress=0.5, metrics={"loss": 0.7})
    clock.now += 59.9
    assert store.claim_job("b", 60) is None
    clock.now += 0.1
    taken = store.claim_job("b", 60)
    assert taken is not None
    assert (taken.id, taken.attempt, taken.owner, taken.stage) == (job.id, 2, "b", "train")
    assert (taken.done, taken.metrics) == ({"snapshot": {"snapshot": "snap_1"}}, {"loss": 0.7})
    assert taken.started_at == job.started_at
    for late in (
        lambda: store.heartbeat(job.id, "a", 60),
        lambda: store.set_progress(job.id, "a", progress=0.9),
        lambda: store.finish_stage(job.id, "a", "train", {}),
        lambda: store.finish_job(job.id, "a", "succeeded"),
        lambda: store.release_job(job.id, "a"),
    ):
        with pytest.raises(LeaseLost, match="belongs to b"):
            late()
    assert store.get_job(job.id) == taken


def test_a_heartbeat_keeps_the_job(store: Store, clock: Clock) -> None:
    job = running(store)
    clock.now += 50
    assert store.heartbeat(job.id, "a", 60).lease_until == clock.now + 60
    clock.now += 50
    assert store.claim_job("b", 60) is None
    assert store.get_job(job.id).heartbeat_at == clock.now - 50


def test_a_trainer_that_stops_in_order_gives_the_job_back_at_once(store: Store) -> None:
    job = running(store)
    store.release_job(job.id, "a")
    with pytest.raises(LeaseLost, match="nobody"):
        store.heartbeat(job.id, "a", 60)
    taken = store.claim_job("b", 60)
    assert taken is not None
    assert (taken.id, taken.attempt) == (job.id, 2)


def test_cancelling_a_queued_job_is_immediate(store: Store) -> None:
    job = store.create_job("dpo")
    assert store.request_cancel(job.id).state == "cancelled"
    assert store.request_cancel(job.id).state == "cancelled"
    assert store.claim_job("a", 60) is None


def test_cancelling_a_running_job_reaches_its_heartbeat(store: Store) -> None:
    job = running(store)
    asked = store.request_cancel(job.id)
    assert (asked.state, asked.cancel_requested) == ("running", True)
    with pytest.raises(LeaseLost) as told:
        store.heartbeat(job.id, "a", 60)
    assert told.value.code == "cancelled"
    ended = store.finish_job(job.id, "a", "cancelled")
    assert (ended.state, ended.owner, ended.lease_until) == ("cancelled", None, None)
    with pytest.raises(LeaseLost):
        store.heartbeat(job.id, "a", 60)


def test_cancelling_a_job_whose_trainer_died_never_gives_it_out_again(store: Store, clock: Clock) -> None:
    asked, dead = running(store), store.create_job("dpo")
    store.request_cancel(asked.id)
    clock.now += 61
    taken = store.claim_job("b", 60)
    assert taken is not None
    assert taken.id == dead.id
    assert store.get_job(asked.id).state == "cancelled"
    clock.now += 61
    assert store.request_cancel(dead.id).state == "cancelled"
    assert store.claim_job("c", 60) is None


def test_what_has_ended_stays_as_it_ended(store: Store) -> None:
    job = running(store)
    ended = store.finish_job(job.id, "a", "succeeded", version="v2")
    assert (ended.state, ended.version, ended.progress, ended.finished_at) == ("succeeded", "v2", 1.0, 1000.0)
    with pytest.raises(Conflict, match="already succeeded"):
        store.request_cancel(job.id)
    with pytest.raises(LeaseLost):
        store.finish_job(job.id, "a", "failed")
    with pytest.raises(InvalidRequest, match="'running'"):
        store.finish_job(job.id, "a", "running")
    assert store.get_job(job.id) == ended


def test_every_change_is_an_event_in_order(store: Store) -> None:
    job = running(store)
    store.set_progress(job.id, "a", stage="train", progress=0.25, metrics={"loss": 0.7})
    store.set_progress(job.id, "a", progress=2.0)
    store.set_progress(job.id, "a", metrics={"margin": 1})
    store.set_progress(job.id, "a")
    store.finish_stage(job.id, "a", "train", {"secret": "path"})
    own = store.add_event(job.id, "log", {"line": "hello"})
    store.request_cancel(job.id)
    store.finish_job(job.id, "a", "cancelled")
    told = [(event.seq, event.kind, event.data) for event in store.events(job.id)]
    assert told == [
        (1, "state", {"state": "queued", "reason": "operator"}),
        (2, "state", {"state": "running", "attempt": 1, "owner": "a", "done": []}),
        (3, "stage", {"stage": "train", "progress": 0.25, "metrics": {"loss": 0.7}}),
        (4, "progress", {"stage": "train", "progress": 1.0}),
        (5, "metrics", {"stage": "train", "progress": 1.0, "metrics": {"margin": 1}}),
        (6, "stage", {"stage": "train", "finished": True}),
        (7, "log", {"line": "hello"}),
        (8, "state", {"state": "running", "cancel_requested": True}),
        (9, "state", {"state": "cancelled", "version": None, "error": None}),
    ]
    assert store.get_job(job.id).metrics == {"loss": 0.7, "margin": 1}
    assert own.seq == 7
    assert [event.seq for event in store.events(job.id, after=7)] == [8, 9]
    assert store.events(job.id, after=9) == []


def test_an_unknown_job_is_not_found(store: Store) -> None:
    for call in (
        lambda: store.get_job("nope"),
        lambda: store.events("nope"),
        lambda: store.add_event("nope", "log", {}),
        lambda: store.request_cancel("nope"),
        lambda: store.heartbeat("nope", "a", 60),
    ):
        with pytest.raises(NotFound, match="'nope'"):
            call()


def test_of_many_trainers_one_gets_the_job(store_url: str, clock: Clock) -> None:
    """Each racer has a store, so connections, of its own."""
    racers = 6
    stores = [Store.open(store_url, clock=clock) for _ in range(racers)]
    gate = Barrier(racers)

    def race(number: int) -> Job | None:
        gate.wait(30)
        return stores[number].claim_job(f"t{number}", 60)

    try:
        with ThreadPoolExecutor(racers) as pool:
            for _ in range(5):
                made = stores[0].create_job("dpo")
                won = [job for job in pool.map(race, range(racers)) if job]
                assert [(job.id, job.attempt) for job in won] == [(made.id, 1)]
                clock.now += 61
                again = [job for job in pool.map(race, range(racers)) if job]
                assert [(job.id, job.attempt) for job in again] == [(made.id, 2)]
                assert again[0].owner is not None
                stores[0].finish_job(made.id, again[0].owner, "succeeded")
    finally:
        for one in stores:
            one.close()


def test_events_of_writers_at_once_have_no_gap(store: Store) -> None:
    job = running(store)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: store.add_event(job.id, "log", {"i": i}), range(40)))
    events = store.events(job.id, after=2)
    assert [event.seq for event in events] == list(range(3, 43))
    assert sorted(event.data["i"] for event in events) == list(range(40))
