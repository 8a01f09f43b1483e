"""Versions, what is live, rollouts and heartbeats."""

from __future__ import annotations

import pytest

from noria.errors import Conflict, InvalidRequest, NotFound
from noria.records import ProcessInfo
from noria.store import Store
from tests.unit.store.conftest import Clock
from tests.unit.store.samples import version


@pytest.fixture
def stocked(store: Store) -> Store:
    """A store with two candidates."""
    store.add_version(version("v1"))
    store.add_version(version("v2", parent="v1", job="job_1"), "f" * 64)
    return store


def states(store: Store) -> dict[str, str]:
    """Each version's state."""
    return {one.id: one.state for one in store.list_versions()}


def test_a_version_comes_back_and_is_added_once(stocked: Store) -> None:
    given = version("v3", parent="v2", metrics={"loss": 0.5}, frozen={"vision_tower": "sha256:ab"})
    stocked.add_version(given)
    stocked.add_version(version("v3", metrics={"loss": 9}))
    assert stocked.get_version("v3") == given
    assert [one.id for one in stocked.list_versions()] == ["v1", "v2", "v3"]
    assert (stocked.manifest_sha256("v2"), stocked.manifest_sha256("v3")) == ("f" * 64, None)
    with pytest.raises(NotFound, match="'v9'"):
        stocked.get_version("v9")


def test_promote_and_rollback_move_live_and_previous_together(stocked: Store) -> None:
    assert (stocked.live(), stocked.previous()) == (None, None)
    with pytest.raises(Conflict, match="nothing to roll back to"):
        stocked.rollback()
    stocked.promote("v1")
    assert (stocked.live(), stocked.previous(), states(stocked)) == ("v1", None, {"v1": "live", "v2": "candidate"})
    stocked.promote("v2")
    assert (stocked.live(), stocked.previous(), states(stocked)) == ("v2", "v1", {"v1": "retired", "v2": "live"})
    stocked.promote("v2")
    assert (stocked.live(), stocked.previous()) == ("v2", "v1")
    assert stocked.rollback() == "v1"
    assert (stocked.live(), stocked.previous(), states(stocked)) == ("v1", "v2", {"v1": "live", "v2": "retired"})


def test_promotion_ends_its_rollout_or_changes_nothing(stocked: Store, clock: Clock) -> None:
    stocked.promote("v1")
    rollout = stocked.create_rollout("v2")
    stocked.claim_rollout("server")
    with pytest.raises(NotFound, match="'roll_x'"):
        stocked.promote("v2", "roll_x")
    assert (stocked.live(), states(stocked)) == ("v1", {"v1": "live", "v2": "candidate"})
    clock.now = 1234.0
    stocked.promote("v2", rollout.id)
    done = stocked.get_rollout(rollout.id)
    assert (done.state, done.finished_at, done.previous) == ("succeeded", 1234.0, "v1")
    clock.now = 1240.0
    told = stocked.finish_rollout(rollout.id, "succeeded", metrics={"pause_s": 1.5})
    assert (told.state, told.finished_at, told.metrics) == ("succeeded", 1234.0, {"pause_s": 1.5})


def test_a_rejected_version_never_goes_live(stocked: Store) -> None:
    stocked.set_version_state("v2", "rejected")
    for call in (stocked.promote, stocked.create_rollout):
        with pytest.raises(Conflict, match="v2 was rejected"):
            call("v2")
        with pytest.raises(NotFound, match="'v9'"):
            call("v9")
    assert stocked.live() is None


def test_only_a_promotion_changes_what_is_live(stocked: Store) -> None:
    stocked.promote("v1")
    for id_, state in (("v1", "rejected"), ("v2", "live")):
        with pytest.raises(Conflict, match="only a promotion"):
            stocked.set_version_state(id_, state)  # type: ignore[arg-type]
    assert states(stocked) == {"v1": "live", "v2": "candidate"}


def test_one_rollout_is_open_at_a_time(stocked: Store) -> None:
    first = stocked.create_rollout("v1", "canary", 10)
    assert (first.state, first.strategy, first.percent, first.previous) == ("queued", "canary", 10, None)
    with pytest.raises(Conflict, match=f"{first.id} of v1 is queued"):
        stocked.create_rollout("v2")
    claimed = stocked.claim_rollout("server")
    assert claimed is not None
    assert (claimed.id, claimed.state) == (first.id, "running")
    assert stocked.claim_rollout("server") is None
    with pytest.raises(Conflict, match="running"):
        stocked.create_rollout("v2")
    with pytest.raises(InvalidRequest, match="'queued'"):
        stocked.finish_rollout(first.id, "queued")
    failed = stocked.finish_rollout(first.id, "failed", "probe: NaN", {"reload_s": 2.0})
    assert (failed.state, failed.reason, failed.metrics) == ("failed", "probe: NaN", {"reload_s": 2.0})
    second = stocked.create_rollout("v2")
    assert [one.id for one in stocked.list_rollouts()] == [second.id, first.id]


def test_a_server_that_starts_takes_up_the_rollout_of_one_that_died(stocked: Store) -> None:
    rollout = stocked.create_rollout("v1")
    stocked.claim_rollout("dead")
    assert stocked.requeue_running_rollouts() == 1
    assert stocked.requeue_running_rollouts() == 0
    claimed = stocked.claim_rollout("new")
    assert claimed is not None
    assert claimed.id == rollout.id


def test_heartbeats_are_fresh_or_not_listed(store: Store, clock: Clock) -> None:
    store.beat(ProcessInfo("s1", "server", 990.0, {"serving": "v1"}))
    store.beat(ProcessInfo("s1", "server", 995.0, {"serving": "v2"}))
    store.beat(ProcessInfo("t1", "trainer", 999.0))
    assert store.processes("server") == [ProcessInfo("s1", "server", 995.0, {"serving": "v2"})]
    assert [one.id for one in store.processes("trainer")] == ["t1"]
    clock.now = 1011.0
    assert store.processes("server") == []
    assert [one.id for one in store.processes("server", fresh_s=16)] == ["s1"]
    store.forget_process("s1")
    assert store.processes("server", fresh_s=99) == []
