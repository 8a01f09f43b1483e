"""Takes rollouts from the store and makes the running engine serve their versions, or leaves it as it was.

Comes in: rollouts that somebody queued, and the store's live version where another process moved it. Goes out: an
engine with the new weights and the version promoted, or the old weights and a rollout marked failed with its reason.
Must not import vllm or torch.

One rollout: validate (a thread, nothing closed yet) -> close the gate, let running requests end -> pause -> reload ->
forget caches -> resume -> probe -> promote, name the new version -> open the gate -> end the rollout: who sees it
succeeded sees its metrics, and is answered by the new version. Whatever fails after the pause puts the old version
back. Should that fail too, no version is whole: the gate turns everybody away and the process ends, so that its
supervisor starts one on the live version.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from noria.errors import InvalidRequest, NoriaError, NotFound, Unavailable
from noria.records import Json, Rollout, RolloutState
from noria.registry import Manifest, Registry, fingerprint
from noria.settings import Settings
from noria.store import Store
from serve.engine.versions import ServingVersion, VersionGate
from serve.release.frozen import check_frozen
from serve.release.ports import Engine
from serve.release.probe import Prober
from serve.release.swap import Swapper
from serve.release.validate import validate_serving

log = logging.getLogger("noria.release")


class EngineLost(Unavailable):
    """A swap failed and so did the way back. Raised out of `Releaser.run`, after the gate was failed."""

    code = "engine_failed"


class Releaser:
    """One engine's rollouts, one at a time, on the event loop that the gate lives on."""

    def __init__(
        self,
        engine: Engine,
        gate: VersionGate,
        store: Store,
        registry: Registry,
        settings: Settings,
        *,
        on_fatal: Callable[[str], None] | None = None,
        before_swap: Callable[[], Awaitable[None]] | None = None,
        scoring: Callable[[], Any] | None = None,
    ) -> None:
        """`engine` is the raw one, not the proxy behind the gate.

        `on_fatal` is called with a reason once the engine is lost; it should make the process end with an error.
        `before_swap` runs once the gate is closed and empty: what hangs on the old weights is let go there.
        `scoring` makes the probe's sampling parameters, vLLM's by default.
        """
        self._gate = gate
        self._store = store
        self._registry = registry
        self._settings = settings.release
        self._on_fatal = on_fatal
        self._before_swap = before_swap
        self._swapper = Swapper(engine)
        self._prober = Prober(engine, scoring)
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._refused: str | None = None  # a live version that did not load: not tried again until live changes

    async def run(self) -> None:
        """Works until it is cancelled. Raises EngineLost."""
        requeued = None
        while True:
            try:
                if requeued is None:
                    requeued = await asyncio.to_thread(self._store.requeue_running_rollouts)
                    if requeued:
                        log.warning("rollouts_requeued", extra={"count": requeued})
                await self.step()
            except EngineLost:
                raise
            except NoriaError as error:
                log.warning("release_waits", extra={"reason": error.message})
            await asyncio.sleep(self._settings.poll_s)

    async def step(self) -> None:
        """Executes one queued rollout; without one, follows the store's live version."""
        rollout = await asyncio.to_thread(self._store.claim_rollout, self._owner)
        if rollout is not None:
            await self._execute(rollout)
            return
        live = await asyncio.to_thread(self._store.live)
        if live is None or live in (self._gate.current.id, self._refused):
            return
        log.info("live_moved", extra={"model_version": live, "from_version": self._gate.current.id})
        try:
            await self.ensure(live)
        except EngineLost as error:
            self._report_fatal(error)
            raise
        except Exception as error:
            self._refused = live
            log.error("live_refused", extra={"model_version": live, "reason": _reason(error)})
            raise

    async def ensure(self, version: str) -> Json:
        """Makes the engine serve `version`, the store untouched; returns the metrics. Raises why it does not."""
        metrics: Json = {}
        await self._change(version, metrics, promote=False)
        self._refused = None
        return metrics

    async def _execute(self, rollout: Rollout) -> None:
        keys = {"rollout_id": rollout.id, "model_version": rollout.version, "from_version": self._gate.current.id}
        log.info("rollout_started", extra=keys)
        metrics: Json = {}
        try:
            if rollout.strategy != "direct":
                raise InvalidRequest(f"strategy {rollout.strategy!r}: this server rolls out directly only")
            await self._change(rollout.version, metrics, promote=True)
        except EngineLost as error:
            log.critical("engine_lost", extra={**keys, "reason": error.message})
            try:
                await asyncio.to_thread(self._store.finish_rollout, rollout.id, "failed", error.message, metrics)
            finally:
                self._report_fatal(error)
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a rollout: it failed, and the old version serves
            log.error("rollout_failed", extra={**keys, **metrics, "reason": _reason(error)})
            await self._finish(rollout.id, "failed", _reason(error), metrics)
        else:
            log.info("rollout_succeeded", extra={**keys, **metrics})
            await self._finish(rollout.id, "succeeded", None, metrics)

    async def _change(self, version: str, metrics: Json, *, promote: bool) -> None:
        """The whole way from validation to the open gate. `metrics` fills as it goes, for failures too."""
        old = self._gate.current
        if version == old.id:
            if promote:  # also the rest of a rollout that a crash cut off after its promotion
                await asyncio.to_thread(self._registry.promote, version)
            return
        started = time.perf_counter()
        try:
            new = await asyncio.to_thread(self._validated, version, old)
        finally:
            metrics["validate_s"] = time.perf_counter() - started
        closed = time.perf_counter()
        try:
            async with self._gate.exclusive(self._settings.drain_s):
                metrics["drain_s"] = time.perf_counter() - closed
                if self._before_swap is not None:
                    await self._before_swap()
                await self._swapper.pause(self._settings.drain_s)
                await self._replace(old, new, metrics, promote)
        finally:
            metrics["pause_s"] = time.perf_counter() - closed

    def _validated(self, version: str, old: ServingVersion) -> ServingVersion:
        manifest = self._registry.verify(version)
        new = ServingVersion(version, fingerprint(manifest), self._registry.path(version) / "serving")
        validate_serving(new.path, old.path)
        check_frozen(new.path, manifest, self._parent(manifest))
        return new

    def _parent(self, manifest: Manifest) -> Manifest | None:
        try:
            return None if manifest.parent is None else self._registry.manifest(manifest.parent)
        except NotFound:  # an operator removed it to make room; the version's own hashes are still held to
            return None

    async def _replace(self, old: ServingVersion, new: ServingVersion, metrics: Json, promote: bool) -> None:
        """With the gate closed and the engine paused: the new version in, proven and promoted, or the old one back."""
        try:
            metrics["reload_s"] = await self._swapper.load(new.path)
            probe = await self._prober.run(new.path.parent)
            metrics |= {"probe_mean_abs_diff": probe.mean_abs_diff, "probe_tokens": probe.tokens}
            metrics |= {f"probe_{kind}_diff": difference for kind, difference in probe.by_kind.items()}
            if promote:  # durable first: a crash from here on starts on the new version
                await asyncio.to_thread(self._registry.promote, new.id)
        except asyncio.CancelledError:
            self._gate.fail("the server is stopping; try again")  # half a swap must not answer anybody
            raise
        except Exception as error:
            await self._restore(old, error, metrics)
            raise
        self._gate.set_current(new)

    async def _restore(self, old: ServingVersion, why: Exception, metrics: Json) -> None:
        try:
            metrics["restore_s"] = await self._swapper.restore(old.path)
            await self._prober.run(old.path.parent, compare=False)
        except asyncio.CancelledError:
            self._gate.fail("the server is stopping; try again")
            raise
        except Exception as error:
            self._gate.fail("the engine lost its weights and restarts; try again")
            message = f"{_reason(why)}; then {old.id} could not be put back: {_reason(error)}"
            raise EngineLost(message) from error

    async def _finish(self, rollout_id: str, state: RolloutState, reason: str | None, metrics: Json) -> None:
        """Writes the end of a rollout, as often as it takes: an end that is lost would block the next rollout."""
        while True:
            try:
                await asyncio.to_thread(self._store.finish_rollout, rollout_id, state, reason, metrics)
                return
            except Unavailable as error:
                log.warning("rollout_end_waits", extra={"rollout_id": rollout_id, "reason": error.message})
                await asyncio.sleep(self._settings.poll_s)

    def _report_fatal(self, error: EngineLost) -> None:
        if self._on_fatal is not None:
            self._on_fatal(error.message)


def _reason(error: BaseException) -> str:
    """What a failed rollout says: the message of our own errors, the class too for the others'."""
    return error.message if isinstance(error, NoriaError) else f"{type(error).__name__}: {error}"
