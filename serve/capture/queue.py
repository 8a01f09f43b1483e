"""The bounded queue between answers and the store, and the thread that empties it.

Comes in: `Captured` from the event loop, which is never made to wait. Goes out: completions in the store, many to a
commit, and counters: sent = stored + dropped once everything is flushed. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError

from noria.errors import Unavailable
from noria.records import Completion
from noria.settings import CaptureSettings
from noria.store.completions import PictureGone
from serve.capture.images import BlobSink
from serve.capture.record import to_completion
from serve.capture.tape import Captured

T = TypeVar("T")
logger = logging.getLogger("noria.capture")
OUTAGE = (
    OperationalError,
    InterfaceError,
    OSError,
    Unavailable,
)  # passes by itself; anything else is the record's fault
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.05, 5.0
MOST_PUTS = 8  # a picture is deleted in the moment between its put and its commit: twice in a row is unheard of


class CompletionSink(Protocol):
    """What this module needs of `noria.store.Store`."""

    def add_completions(self, batch: list[Completion], has_picture: Callable[[str], bool]) -> object:
        """Writes them in one transaction. Raises PictureGone where a picture is not there any more."""


@dataclass(frozen=True)
class CaptureCounts:
    """A moment's counters. `retries` are failed writes that were tried again."""

    sent: int
    stored: int
    dropped: int
    waiting: int
    retries: int


class CaptureQueue:
    """Takes completions without ever blocking, and commits them in groups from a thread of its own.

    Past `queue_size` the newest are dropped, and counted. While the store does not answer the writer waits, longer
    and longer, and tries again; a record that the store refuses for its own sake is dropped alone, and counted.
    """

    def __init__(
        self,
        store: CompletionSink,
        blobs: BlobSink,
        settings: CaptureSettings,
        scrub: Callable[[Completion], Completion] = lambda completion: completion,
    ) -> None:
        """`scrub` makes a record fit to be kept; it runs in the writer's thread."""
        self._store, self._blobs, self._settings, self._scrub = store, blobs, settings, scrub
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queue: deque[Captured] = deque()
        self._pending: dict[str, int] = {}  # id -> its number; until it is stored or dropped
        self._waiters: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._offered = self._settled = self._dropped_at_door = 0  # numbers of accepted ones, in order
        self._stored = self._dropped = self._retries = 0
        self._hurry = False
        self._closed = threading.Event()
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="noria-capture", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> CaptureCounts:
        """All counters at one moment: sent = stored + dropped + waiting."""
        with self._lock:
            dropped = self._dropped + self._dropped_at_door
            sent = self._offered + self._dropped_at_door
            return CaptureCounts(sent, self._stored, dropped, self._offered - self._settled, self._retries)

    @property
    def sent(self) -> int:
        """Completions offered."""
        return self.counts.sent

    @property
    def stored(self) -> int:
        """Completions committed."""
        return self.counts.stored

    @property
    def dropped(self) -> int:
        """Completions lost to a full queue or a failed write."""
        return self.counts.dropped

    def offer(self, captured: Captured) -> None:
        """Takes a completion; a full or closed queue drops it and counts it. Never blocks."""
        with self._lock:
            if self._closed.is_set() or self._offered - self._settled >= self._settings.queue_size:
                self._dropped_at_door += 1
                return
            self._offered += 1
            self._pending[captured.id] = self._offered
            self._queue.append(captured)
            self._work.notify()

    async def flush(self, completion_id: str | None = None) -> None:
        """Returns when that completion, or everything offered so far, is committed or known to be dropped."""
        with self._lock:
            target = self._offered if completion_id is None else self._pending.get(completion_id, 0)
            if target <= self._settled:
                return
            loop = asyncio.get_running_loop()
            settled: asyncio.Future[None] = loop.create_future()
            self._waiters.append((target, loop, settled))
            self._hurry = True
            self._work.notify()
        await settled

    async def close(self, wait_s: float = 30.0) -> None:
        """Takes nothing more and writes what waits; what the store has not taken after `wait_s` is dropped."""
        with self._lock:
            self._give_up_at = time.monotonic() + wait_s
            self._closed.set()
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while batch := self._take():
            self._write(batch)

    def _take(self) -> list[Captured]:
        """The next group, once others had their chance to join it; empty when the queue is closed and done."""
        with self._work:
            while not self._queue and not self._closed.is_set():
                self._work.wait()
            until = time.monotonic() + self._settings.commit_ms / 1000
            while len(self._queue) < self._settings.batch and not (self._hurry or self._closed.is_set()):
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._work.wait(left)
            self._hurry = False
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.batch))]

    def _write(self, batch: list[Captured]) -> None:
        stored = 0
        for _ in range(MOST_PUTS):
            made = (self._attempt(partial(self._make, captured)) for captured in batch)
            completions = [one for one in made if one is not None]
            try:
                stored = self._commit(completions)
            except PictureGone:  # somebody deletes the same picture: put it again
                self._retries += 1
                continue
            break
        else:
            logger.error("capture dropped: its pictures were deleted again and again", extra={"count": len(batch)})
        self._settle(batch, stored)

    def _make(self, captured: Captured) -> Completion:
        return self._scrub(to_completion(captured, self._blobs))

    def _commit(self, completions: list[Completion]) -> int:
        """Writes all in one transaction, or, where one of them is refused, each in its own. Returns how many are in."""
        if not completions:
            return 0
        if self._attempt(partial(self._add, completions)):
            return len(completions)
        if len(completions) == 1:
            return 0
        return sum(bool(self._attempt(partial(self._add, [one]))) for one in completions)

    def _add(self, completions: list[Completion]) -> bool:
        self._store.add_completions(completions, self._blobs.exists)
        return True

    def _attempt(self, action: Callable[[], T]) -> T | None:
        """What the action returns; None when it fails for good. An outage is waited for, up to the closing time."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return action()
            except OUTAGE as error:
                if time.monotonic() >= self._give_up_at:
                    logger.error("capture dropped: the store did not come back", extra={"reason": type(error).__name__})
                    return None
                self._retries += 1
                self._pause(min(backoff_s, max(0.0, self._give_up_at - time.monotonic())))
                backoff_s = min(2 * backoff_s, MOST_BACKOFF_S)
            except PictureGone:
                raise
            except Exception as error:  # one bad record must not end the thread; it is counted
                logger.error("capture refused", extra={"reason": type(error).__name__}, exc_info=error)
                return None

    def _pause(self, wait_s: float) -> None:
        """Waits, but not past the moment at which closing begins: then there is a deadline to meet."""
        if self._closed.is_set():
            time.sleep(wait_s)
        else:
            self._closed.wait(wait_s)

    def _settle(self, batch: list[Captured], stored: int) -> None:
        with self._lock:
            self._settled += len(batch)
            self._stored += stored
            self._dropped += len(batch) - stored
            for captured in batch:
                self._pending.pop(captured.id, None)
            done = [waiter for waiter in self._waiters if waiter[0] <= self._settled]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > self._settled]
        for _, loop, settled in done:
            loop.call_soon_threadsafe(_resolve, settled)


def _resolve(settled: asyncio.Future[None]) -> None:
    if not settled.done():
        settled.set_result(None)
