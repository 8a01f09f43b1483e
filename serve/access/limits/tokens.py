"""The tokens that each key has used today, in memory, and now and then in the store.

Comes in: tokens as the engine gives them. Goes out: totals of the day (UTC), and increments to the store every few
seconds. What a kill -9 loses is what came in since the last write: at most `WRITE_S` seconds of tokens, and more only
while the store does not answer. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger("noria.limits")
DAY_S = 86_400
WRITE_S = 2.0


class TokenStore(Protocol):
    """What this module needs of `noria.store.Store`."""

    def add_tokens(self, used: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        """Adds to keys' days; the new totals."""
        ...

    def tokens_of(self, day: int) -> dict[str, int]:
        """Each key's tokens of a day."""
        ...


class TokenBook:
    """Tokens by key, of today. Without a store they last as long as the process."""

    def __init__(self, store: TokenStore | None = None, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch."""
        self._store, self._clock = store, clock
        self._day = int(clock() // DAY_S)
        self._ends = float((self._day + 1) * DAY_S)
        self._totals: dict[str, int] = {}
        self._unwritten: dict[tuple[str, int], int] = {}
        self._writing = asyncio.Lock()
        self.failed_writes = 0

    def used(self, key_id: str) -> int:
        """The key's tokens of today."""
        self._turn()
        return self._totals.get(key_id, 0)

    def add(self, key_id: str, tokens: int) -> None:
        """Counts tokens."""
        if tokens:
            self._turn()
            self._totals[key_id] = self._totals.get(key_id, 0) + tokens
            dated = key_id, self._day
            self._unwritten[dated] = self._unwritten.get(dated, 0) + tokens

    def left_s(self) -> float:
        """Seconds until the next day begins."""
        self._turn()
        return self._ends - self._clock()

    async def load(self) -> None:
        """Reads what the day's earlier servers have counted. Raises Unavailable."""
        if self._store is not None:
            self._turn()
            for key_id, tokens in (await asyncio.to_thread(self._store.tokens_of, self._day)).items():
                self._totals[key_id] = tokens + self._unwritten.get((key_id, self._day), 0)

    async def keep(self) -> None:
        """Writes every `WRITE_S` seconds until it is cancelled."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self.write()

    async def write(self) -> None:
        """Adds what is new to the store, and learns what other servers over the same store have added.

        A store that does not answer is logged and counted; nothing is lost, the next write has it all.
        """
        if self._store is None:
            return
        async with self._writing:  # the last write, at the end, waits for one that runs
            if not self._unwritten:
                return
            used, self._unwritten = self._unwritten, {}
            try:
                totals = await asyncio.shield(asyncio.to_thread(self._store.add_tokens, used))
            except Exception as error:  # counting must go on, whatever the store says
                self.failed_writes += 1
                logger.warning("tokens_not_written", extra={"reason": type(error).__name__}, exc_info=error)
                for dated, tokens in used.items():
                    self._unwritten[dated] = self._unwritten.get(dated, 0) + tokens
                return
        for (key_id, day), tokens in totals.items():
            if day == self._day:
                self._totals[key_id] = tokens + self._unwritten.get((key_id, day), 0)

    def _turn(self) -> None:
        """Begins a new day. A clock that is set back begins none: totals would be counted from nothing."""
        now = self._clock()
        if now >= self._ends:
            self._day = int(now // DAY_S)
            self._ends = float((self._day + 1) * DAY_S)
            self._totals.clear()
