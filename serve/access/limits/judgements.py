"""How many preferences and feedback a key may record within an hour: a guard against poisoning.

Comes in: a judgement about to be recorded, over either wire. Goes out: leave, or RateLimited. Counted in the store, so
that a restart or a second server does not give a poisoner a new hour. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from noria.errors import NoriaError, RateLimited
from noria.records import Json
from noria.store.limits import Spent
from serve.access.caller import Caller, current_caller
from serve.access.limits.limits import Limits

HOUR_S = 3600.0


class JudgementStore(Protocol):
    """What this module needs of `noria.store.Store`."""

    def spend_judgement(self, key_id: str, limit: int, window_s: float) -> Spent:
        """Counts one more, unless it is one too many."""
        ...

    def give_judgement_back(self, id_: int) -> None:
        """It came to nothing."""
        ...

    def judgements_spent(self, key_id: str, window_s: float) -> int:
        """How many count now."""
        ...


@dataclass
class Recording:
    """What a handler says of the judgement: `new` is False where the same was recorded before."""

    new: bool = True


class CallerLimits:
    """The limits as the handlers see them: the caller is the current one."""

    def __init__(self, limits: Limits, store: JudgementStore) -> None:
        self._limits, self._store = limits, store

    @asynccontextmanager
    async def recording(self) -> AsyncIterator[Recording]:
        """Around the recording of one judgement. What is refused or not new does not count.

        It is counted first: a crash in between leaves one too many counted, never one too few. Raises RateLimited.
        """
        caller = current_caller.get()
        limit = self._limits.rules(caller).preferences_per_hour
        recording = Recording()
        if limit is None:
            yield recording
            return
        spent = await asyncio.to_thread(self._store.spend_judgement, caller.key_id, limit, HOUR_S)
        if spent.id is None:
            raise self._limits.refuse("preferences_per_hour", _too_many(limit, spent.wait_s))
        try:
            yield recording
        except NoriaError:
            recording.new = False
            raise
        finally:
            if not recording.new:
                await asyncio.to_thread(self._store.give_judgement_back, spent.id)

    async def describe(self) -> Json:
        """The caller's limits and what is used of them."""
        caller: Caller = current_caller.get()
        limit, used = self._limits.rules(caller).preferences_per_hour, None
        if limit is not None:
            used = await asyncio.to_thread(self._store.judgements_spent, caller.key_id, HOUR_S)
        return {**self._limits.describe(caller), "preferences_per_hour": {"limit": limit, "used": used}}


def _too_many(limit: int, wait_s: float) -> RateLimited:
    return RateLimited(
        f"limit of {limit} preferences and feedback an hour reached: try again in {max(1, -(-wait_s // 1)):.0f} s",
        retry_after_s=wait_s,
    )
