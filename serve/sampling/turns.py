"""Who may sample now: many when nobody else is there, few beside users.

Comes in: samples that want into the engine, and the number of users' requests inside. Goes out: turns, given in order;
when users come, the newest turns above the limit are stopped, and their samples go first when there is room again.
Pure asyncio, one event loop. Must not import vllm.

vLLM's own priorities order who is scheduled first and who loses its KV blocks; they do not take a seat from a sequence
that runs, nor does a running sequence cost the others nothing: each shares every step. Hence this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

QUIET_S = 0.1  # how long users must have been gone before sampling takes the whole engine again


class Turn:
    """A sample's time in the engine. `stopped` is true once it was asked to leave."""

    def __init__(self) -> None:
        self.stopped = False
        self._stop: Callable[[], None] | None = None

    def on_stop(self, stop: Callable[[], None]) -> None:
        """What asks the sample to leave; called at most once, at once where the turn is stopped already."""
        self._stop = stop
        if self.stopped:
            stop()

    def stop(self) -> None:
        """Asks the sample to leave."""
        if not self.stopped:
            self.stopped = True
            if self._stop is not None:
                self._stop()


class Turns:
    """Hands turns out, `alone` at most, `beside_users` while users' requests are inside."""

    def __init__(self, alone: int, beside_users: int, *, quiet_s: float = QUIET_S) -> None:
        self.alone, self.beside_users = alone, min(alone, beside_users)
        self.set_back = 0
        self._quiet_s = quiet_s
        self._users = 0
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._running: list[Turn] = []
        self._waiting: deque[asyncio.Future[Turn]] = deque()

    @property
    def running(self) -> int:
        """Samples in the engine."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Samples that wait for a turn."""
        return len(self._waiting)

    def users(self, inside: int) -> None:
        """Takes note of how many users' requests are inside; see `VersionGate.on_users`."""
        self._users = inside
        if self._timer is not None:
            self._timer.cancel()  # they are back: how long they are gone counts from when the last one leaves
            self._timer = None
        if inside:
            self._busy = True
            for turn in [one for one in self._running if not one.stopped][self.beside_users :]:
                self.set_back += 1
                turn.stop()
        elif self._busy:
            self._timer = asyncio.get_running_loop().call_later(self._quiet_s, self._quiet)

    @asynccontextmanager
    async def turn(self, *, again: bool = False) -> AsyncIterator[Turn]:
        """Waits for a turn; `again` goes before those who have not had one. It may be stopped before it began."""
        turn = await self._wait(again)
        try:
            yield turn
        finally:
            self._end(turn)

    async def _wait(self, again: bool) -> Turn:
        ticket: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        if again:
            self._waiting.appendleft(ticket)
        else:
            self._waiting.append(ticket)
        self._admit()
        try:
            return await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():
                self._end(ticket.result())
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            raise

    def _admit(self) -> None:
        limit = self.beside_users if self._busy else self.alone
        while self._waiting and len(self._running) < limit:
            ticket = self._waiting.popleft()
            if not ticket.done():
                turn = Turn()
                self._running.append(turn)
                ticket.set_result(turn)

    def _end(self, turn: Turn) -> None:
        self._running.remove(turn)
        self._admit()

    def _quiet(self) -> None:
        self._busy = False
        self._admit()
