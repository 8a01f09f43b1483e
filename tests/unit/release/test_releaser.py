"""Rollouts on a real store, registry and gate: every way they can end, and what is then live, serving and written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from noria.errors import Unavailable
from noria.records import Rollout
from noria.registry import ManifestDraft, Registry, fingerprint
from noria.settings import ReleaseSettings, Settings
from noria.store import Store
from serve.engine.versions import ServingVersion, Trace, VersionGate
from serve.release.releaser import EngineLost, Releaser
from tests.unit.release.fakes import FakeEngine, publish, write_serving

SWAP = ["pause wait", "reload v2", "reset prefix", "reset encoder", "resume", "probe text", "probe image"]
BACK = ["pause abort", "reload v1", "zero", "reset prefix", "reset encoder", "resume"]
OLD_PROBE = ["probe text", "probe image"]


@dataclass
class World:
    """One server's parts, v1 live and loaded."""

    store: Store
    registry: Registry
    engine: FakeEngine
    gate: VersionGate
    releaser: Releaser
    fatal: list[str]

    def rollout(self, version: str) -> Rollout:
        """Queues a rollout."""
        return self.store.create_rollout(version)

    def ended(self, rollout: Rollout) -> Rollout:
        """The rollout as the store has it now."""
        return self.store.get_rollout(rollout.id)

    def serves(self, version: str) -> bool:
        """Whether gate, engine and store agree on `version`, and the gate is open."""
        loaded = self.engine.loaded.parent.name
        return (
            (self.gate.current.id, loaded, self.store.live()) == (version,) * 3
            and not self.gate.closed
            and not self.gate.failed
            and not self.engine.paused
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """v1 is live; nothing else is published."""
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        registry = Registry(tmp_path / "models", store)
        store.promote(publish(registry, 1.0))
        serving = registry.path("v1") / "serving"
        gate = VersionGate(ServingVersion("v1", fingerprint(registry.manifest("v1")), serving))
        engine = FakeEngine(serving)
        settings = Settings(home=tmp_path, release=ReleaseSettings(drain_s=0.2, poll_s=0.01))
        fatal: list[str] = []
        releaser = Releaser(engine, gate, store, registry, settings, on_fatal=fatal.append, scoring=lambda: "scoring")
        yield World(store, registry, engine, gate, releaser, fatal)


async def test_a_rollout_swaps_proves_and_promotes(world: World) -> None:
    publish(world.registry, 2.0, expected=2.1)
    rollout = world.rollout("v2")
    await world.releaser.step()
    assert world.serves("v2")
    assert world.engine.calls == SWAP
    assert world.gate.current.fingerprint == fingerprint(world.registry.manifest("v2"))
    assert world.store.previous() == "v1"
    assert [version.state for version in world.store.list_versions()] == ["retired", "live"]
    ended = world.ended(rollout)
    assert (ended.state, ended.reason) == ("succeeded", None)
    assert ended.metrics["probe_mean_abs_diff"] == pytest.approx(0.1)
    assert ended.metrics["probe_tokens"] == 4
    assert ended.metrics["probe_image_diff"] == ended.metrics["probe_text_diff"] == pytest.approx(0.1)
    timings = [ended.metrics[key] for key in ("validate_s", "drain_s", "reload_s", "pause_s")]
    assert all(seconds >= 0 for seconds in timings)
    assert ended.metrics["pause_s"] >= ended.metrics["drain_s"] + ended.metrics["reload_s"]


async def test_a_rollback_is_a_rollout_of_the_previous_version(world: World) -> None:
    publish(world.registry, 2.0)
    world.rollout("v2")
    await world.releaser.step()
    world.rollout("v1")
    await world.releaser.step()
    assert world.serves("v1")
    assert world.store.previous() == "v2"
    assert world.engine.calls[len(SWAP) :][:2] == ["pause wait", "reload v1"]


async def test_a_rollout_of_what_serves_already_touches_no_engine(world: World) -> None:
    rollout = world.rollout("v1")
    await world.releaser.step()
    assert world.ended(rollout).state == "succeeded"
    assert world.serves("v1") and world.engine.calls == []


async def test_a_version_that_does_not_validate_never_reaches_the_engine(world: World) -> None:
    publish(world.registry, float("nan"))
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed"
    assert "language_model.model.norm.weight holds NaN or infinity" in (ended.reason or "")
    assert world.serves("v1") and world.engine.calls == []


async def test_bytes_that_differ_from_the_manifest_never_reach_the_engine(world: World) -> None:
    file = world.registry.path(publish(world.registry, 2.0)) / "serving" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "model.safetensors" in (ended.reason or "")
    assert world.serves("v1") and world.engine.calls == []


async def test_requests_that_do_not_end_in_time_give_the_swap_up(world: World) -> None:
    publish(world.registry, 2.0)
    running = Trace("long", streaming=True)
    await world.gate.admit(running)
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "still running after 0.2 s" in (ended.reason or "")
    assert world.serves("v1") and world.engine.calls == []
    assert running.version == world.gate.current


async def test_an_engine_that_does_not_get_idle_is_resumed(world: World) -> None:
    publish(world.registry, 2.0)
    world.engine.hang_on_pause = True
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "not idle after 0.2 s" in (ended.reason or "")
    assert world.serves("v1") and world.engine.calls == ["pause wait", "resume"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("ValueError: shape", "could not load v2: ValueError: shape"), (RuntimeError("rpc"), "RuntimeError: rpc")],
)
async def test_a_failed_reload_puts_the_old_version_back(world: World, fault: str | Exception, says: str) -> None:
    publish(world.registry, 2.0)
    world.engine.faults["reload v2"] = fault
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and says in (ended.reason or "")
    assert ended.metrics["restore_s"] >= 0
    assert world.serves("v1")
    assert world.engine.calls == ["pause wait", "reload v2", *BACK, *OLD_PROBE]
    assert world.store.get_version("v2").state == "candidate"


async def test_keys_of_old_weights_that_stay_are_a_failure(world: World) -> None:
    publish(world.registry, 2.0)
    world.engine.faults["reset prefix"] = "in use"
    rollout = world.rollout("v2")
    with pytest.raises(EngineLost):
        await world.releaser.step()
    assert "still holds keys and values" in (world.ended(rollout).reason or "")


async def test_a_probe_that_disagrees_puts_the_old_version_back(world: World) -> None:
    publish(world.registry, 2.0, expected=2.5)
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "by 0.5 nats on average over the text prompts, 0.25 are" in (ended.reason or "")
    assert world.serves("v1")
    assert world.engine.calls == [*SWAP, *BACK, *OLD_PROBE]


async def test_right_text_does_not_hide_wrong_pictures(world: World) -> None:
    """Over all prompts the mean is 0.2 and would pass; over those with a picture it is 0.4."""
    staging = world.registry.path(publish(world.registry, 2.0))
    probe = json.loads((staging / "probe.json").read_text())
    next(prompt for prompt in probe["prompts"] if prompt["image_png"])["logprobs"] = [-2.4, -2.4]
    again = world.registry.begin("again")
    shutil.copytree(staging / "serving", again / "serving")
    (again / "probe.json").write_text(json.dumps(probe))
    rollout = world.rollout(world.registry.publish(again, ManifestDraft(method="test")).id)
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "by 0.4 nats on average over the image prompts" in (ended.reason or "")
    assert world.serves("v1")


async def test_hashes_of_frozen_modules_that_are_not_so_never_reach_the_engine(world: World) -> None:
    staging = world.registry.begin("liar")
    write_serving(staging / "serving", 2.0)
    draft = ManifestDraft(method="test", parent="v1", frozen={"vision_tower": "sha256:0"})
    rollout = world.rollout(world.registry.publish(staging, draft).id)
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "vision_tower hashes to sha256:" in (ended.reason or "")
    assert world.serves("v1") and world.engine.calls == []


async def test_nan_in_the_engine_puts_the_old_version_back(world: World) -> None:
    publish(world.registry, 2.0)
    world.engine.nan = True
    rollout = world.rollout("v2")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "prompt 0 is not finite" in (ended.reason or "")
    assert world.serves("v1")
    assert "zero" in world.engine.calls


async def test_a_version_without_a_probe_is_looked_at_for_nan(world: World) -> None:
    publish(world.registry, 2.0, probe=False)
    rollout = world.rollout("v2")
    await world.releaser.step()
    assert world.serves("v2")
    assert world.ended(rollout).metrics["probe_mean_abs_diff"] is None
    assert world.ended(rollout).metrics["probe_tokens"] == 15


async def test_a_version_rejected_on_the_way_is_not_promoted(world: World) -> None:
    publish(world.registry, 2.0)
    rollout = world.rollout("v2")
    world.store.set_version_state("v2", "rejected")
    await world.releaser.step()
    ended = world.ended(rollout)
    assert ended.state == "failed" and "v2 was rejected" in (ended.reason or "")
    assert world.serves("v1")


async def test_no_way_back_turns_everybody_away_and_says_so(world: World) -> None:
    publish(world.registry, 2.0)
    world.engine.faults = {"reload v2": "bad", "reload v1": "bad too"}
    rollout = world.rollout("v2")
    waiting: list[asyncio.Task[ServingVersion]] = []
    running = Trace("a", streaming=True)
    await world.gate.admit(running)
    swap = asyncio.create_task(world.releaser.run())
    await until(lambda: world.gate.closed)
    waiting.append(asyncio.create_task(world.gate.admit(Trace("b", streaming=True))))
    world.gate.release(running)
    with pytest.raises(EngineLost, match="v1 could not be put back"):
        await swap
    ended = world.ended(rollout)
    assert ended.state == "failed" and "could not load v2: bad; then v1 could not be" in (ended.reason or "")
    assert world.fatal == [ended.reason]
    assert world.gate.failed and world.store.live() == "v1"
    for refused in (waiting[0], world.gate.admit(Trace("c"))):
        with pytest.raises(Unavailable, match="try again"):
            await refused


async def test_requests_queue_during_a_swap_and_get_the_new_version(world: World) -> None:
    publish(world.registry, 2.0)
    running = Trace("a", streaming=True)
    await world.gate.admit(running)
    world.rollout("v2")
    swap = asyncio.create_task(world.releaser.step())
    await until(lambda: world.gate.closed)
    late = [asyncio.create_task(world.gate.admit(Trace(f"{n}", streaming=True))) for n in range(3)]
    await asyncio.sleep(0.02)
    assert running.version is not None and running.version.id == "v1"
    assert not any(task.done() for task in late) and world.engine.calls == []
    world.gate.release(running)
    await swap
    assert {version.id for version in await asyncio.gather(*late)} == {"v2"}


async def test_a_rollout_that_a_crash_cut_short_is_taken_up_again(world: World) -> None:
    publish(world.registry, 2.0)
    rollout = world.rollout("v2")
    assert world.store.claim_rollout("a server that died") is not None
    task = asyncio.create_task(world.releaser.run())
    await until(lambda: world.ended(rollout).state == "succeeded")
    assert world.serves("v2") and "pause_s" in world.ended(rollout).metrics
    await stop(task)


async def test_a_rollout_that_was_promoted_before_the_crash_only_ends(world: World) -> None:
    publish(world.registry, 2.0)
    rollout = world.rollout("v2")
    await world.releaser.ensure("v2")  # as a server that starts on the live version
    world.store.claim_rollout("a server that died")
    world.store.promote("v2")
    world.store.requeue_running_rollouts()
    calls = len(world.engine.calls)
    await world.releaser.step()
    assert world.ended(rollout).state == "succeeded" and world.serves("v2")
    assert world.store.previous() == "v1" and len(world.engine.calls) == calls


async def test_the_live_version_is_followed_when_another_process_moves_it(world: World) -> None:
    publish(world.registry, 2.0)
    world.store.promote("v2")
    await world.releaser.step()
    assert world.serves("v2")
    assert world.engine.calls == SWAP


async def test_a_live_version_that_does_not_load_is_tried_once(world: World) -> None:
    publish(world.registry, 2.0)
    world.store.promote("v2")
    world.engine.faults["reload v2"] = "bad"
    task = asyncio.create_task(world.releaser.run())
    await until(lambda: "probe image" in world.engine.calls)
    await asyncio.sleep(0.1)
    assert not task.done()
    await stop(task)
    assert world.engine.calls.count("reload v2") == 1
    assert world.gate.current.id == "v1" and world.engine.loaded.parent.name == "v1"


async def test_a_server_that_stops_in_a_swap_answers_nobody_with_half_a_version(world: World) -> None:
    publish(world.registry, 2.0)
    rollout = world.rollout("v2")
    world.engine.faults["reset encoder"] = asyncio.CancelledError()
    with contextlib.suppress(asyncio.CancelledError):
        await world.releaser.step()
    with pytest.raises(Unavailable, match="stopping"):
        await world.gate.admit(Trace("late"))
    assert world.ended(rollout).state == "running"
    assert world.store.requeue_running_rollouts() == 1


async def test_a_strategy_that_this_server_does_not_know_fails(world: World) -> None:
    publish(world.registry, 2.0)
    rollout = world.store.create_rollout("v2", "canary", 10)
    await world.releaser.step()
    assert world.ended(rollout).state == "failed" and world.serves("v1")


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; TimeoutError after ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def stop(task: asyncio.Task[None]) -> None:
    """Cancels a running releaser."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
