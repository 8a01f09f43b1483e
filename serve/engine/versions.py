"""Which version answers: one gate that every request passes and that a swap closes.

Comes in: requests (as a `Trace` each) and swaps (`VersionGate.exclusive`). Goes out: the `ServingVersion` that a
request is bound to, from its first token to its last. Pure asyncio, one event loop, no locks between threads.
Must not import vllm, fastapi or the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from noria.errors import Unavailable

SWEEP_S = 0.05  # how often a waiting swap looks for requests that only their readers keep inside


@dataclass(frozen=True)
class ServingVersion:
    """A version as the engine has it loaded: its id, its fingerprint `vN-xxxxxxxx`, and its `serving/` folder."""

    id: str
    fingerprint: str
    path: Path


@dataclass
class Trace:
    """What one request knows of itself while it runs; made at the door (HTTP middleware, gRPC handler).

    `version` is None until the gate lets the request in and never changes after. `streaming` says that tokens go
    out as they come. `held` counts admissions: a request with many prompts passes the gate once per prompt.
    `to_end` says that the request keeps one admission until whoever made the trace calls `VersionGate.finish`.
    `logprobs` asks the engine for the chosen tokens' log-probabilities even where the client did not.
    `background` marks what is no user's (sampling for a trainer): it is bound to a version and holds a swap up like
    any other, but does not count as a user's request.
    `began` is a `time.perf_counter()` in seconds.
    """

    request_id: str = ""
    version: ServingVersion | None = None
    streaming: bool = False
    held: int = 0
    to_end: bool = False
    over: bool = False
    logprobs: bool = False
    background: bool = False
    began: float = field(default_factory=time.perf_counter)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the version that answers, once known."""
        return self.version.fingerprint if self.version else None


current_trace: ContextVar[Trace | None] = ContextVar("noria_trace", default=None)


class VersionGate:
    """Lets requests in while open; closes for a swap, waits until all inside have left, opens again.

    A request that is inside may enter again while the gate is closed (its further prompts, the steps of a beam
    search): it must end on the version on which it began, and the swap waits for it anyway.
    """

    def __init__(self, current: ServingVersion) -> None:
        self._current = current
        self._in_flight = 0
        self._users = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._swap = asyncio.Lock()
        self._sweepers: list[Callable[[], None]] = []
        self._listeners: list[Callable[[ServingVersion], None]] = []
        self._user_listeners: list[Callable[[int], None]] = []
        self._failure_listeners: list[Callable[[], None]] = []
        self._failure: str | None = None

    def on_drain(self, sweep: Callable[[], None]) -> None:
        """Has `sweep` called again and again while a swap waits: it releases requests that the engine has ended
        but whose readers are slow."""
        self._sweepers.append(sweep)

    def on_change(self, listener: Callable[[ServingVersion], None]) -> None:
        """Has `listener` called with each new current version."""
        self._listeners.append(listener)

    def on_users(self, listener: Callable[[int], None]) -> None:
        """Has `listener` called with the number of users' requests inside whenever it changes."""
        self._user_listeners.append(listener)

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Has `listener` called when the gate fails."""
        self._failure_listeners.append(listener)

    @property
    def current(self) -> ServingVersion:
        """The version that new requests get."""
        return self._current

    @property
    def in_flight(self) -> int:
        """Users' requests inside."""
        return self._users

    @property
    def closed(self) -> bool:
        """True while a swap has the gate closed; new requests wait."""
        return not self._open.is_set()

    @property
    def failed(self) -> bool:
        """True after `fail`."""
        return self._failure is not None

    async def opened(self) -> None:
        """Returns when no swap has the gate closed."""
        await self._open.wait()

    def fail(self, message: str) -> None:
        """Turns everybody away from now on with Unavailable, those who wait too: the engine holds no whole version.

        There is no way back; the process ends, and its supervisor starts one on the live version.
        """
        self._failure = message
        self._open.set()
        for listener in self._failure_listeners:
            listener()

    async def admit(self, trace: Trace) -> ServingVersion:
        """Waits until the gate is open, then binds the trace to the current version. Pair it with `release`.

        Raises Unavailable (code `engine_failed`) after `fail`.
        """
        while not trace.held and not self._open.is_set():
            await self._open.wait()
        if self._failure is not None and not trace.held:
            raise Unavailable(self._failure, code="engine_failed")
        if not trace.held:
            self._in_flight += 1
            self._idle.clear()
            trace.version = self._current
            if not (trace.streaming or trace.over):
                trace.to_end, trace.held = True, 1
            self._count_user(trace, 1)
        trace.held += 1
        return trace.version or self._current

    def release(self, trace: Trace) -> None:
        """Gives one admission back; the last one lets a waiting swap go on."""
        if trace.held:
            trace.held -= 1
            if not trace.held:
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
                self._count_user(trace, -1)

    def _count_user(self, trace: Trace, change: int) -> None:
        if not trace.background:
            self._users += change
            for listener in self._user_listeners:
                listener(self._users)

    def finish(self, trace: Trace) -> None:
        """The request is over, however it ended: gives back what a non-streaming request kept."""
        trace.over = True
        if trace.to_end:
            trace.to_end = False
            self.release(trace)

    @asynccontextmanager
    async def exclusive(self, wait_s: float) -> AsyncIterator[None]:
        """Closes the gate, waits until nobody is inside, yields, and opens it again, whatever happened.

        Raises Unavailable (code `drain_timeout`) when requests are still inside after `wait_s` seconds; the gate
        is open again then. One swap at a time: a second one waits for the first.
        """
        async with self._swap:
            self._open.clear()
            try:
                if not await self._drained(wait_s):
                    raise Unavailable(
                        f"{self._in_flight} requests were still running after {wait_s:g} s; the swap was given up",
                        code="drain_timeout",
                    )
                yield
            finally:
                self._open.set()

    async def _drained(self, wait_s: float) -> bool:
        until = time.monotonic() + wait_s
        while self._in_flight:
            for sweep in self._sweepers:
                sweep()
            left = until - time.monotonic()
            if not self._in_flight or left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), min(left, SWEEP_S))
        return not self._in_flight

    def set_current(self, version: ServingVersion) -> None:
        """Names the version that new requests get. Only inside `exclusive`."""
        if not self.closed or self._in_flight:
            raise RuntimeError("set_current outside of VersionGate.exclusive")
        self._current = version
        for listener in self._listeners:
            listener(version)
