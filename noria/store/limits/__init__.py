"""What keys have used that must outlive the server: tokens of the day, judgements of the hour.

Comes in: amounts. Goes out: totals, and whether one more is allowed. No text and no user: ids of keys and numbers.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Double, Index, Integer, Table, delete, func, insert, select

from noria.store.completions import Part
from noria.store.tables import Words, metadata

CLOCK_GRAIN_S = 1e-6  # a double of seconds since the epoch is no finer: who waits to the second must not miss by an ulp

key_tokens = Table(
    "key_tokens",
    metadata,
    Column("key_id", Words, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("tokens", BigInteger, nullable=False),
)

key_judgements = Table(
    "key_judgements",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("key_id", Words, nullable=False),
    Column("at", Double, nullable=False),
    Index("ix_key_judgements_key_id_at", "key_id", "at"),
)

JUDGEMENTS = "judgements"  # the marker behind which those who count judgements queue


@dataclass(frozen=True)
class Spent:
    """Whether a judgement was allowed: `id` is its row, or None, and then `wait_s` says how long to wait, in s."""

    id: int | None
    wait_s: float = 0.0


class LimitStore(Part):
    """The store's counts for limits. A day is the number of days since 1970-01-01 (UTC)."""

    def add_tokens(self, used: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        """Adds tokens to keys' days; returns the new totals, which may hold what other servers have added."""
        totals = {}
        with self._db.write() as conn:
            for (key_id, day), tokens in sorted(used.items()):
                row = self._db.adding(key_tokens, ("key_id", "day"), "tokens").returning(key_tokens.c.tokens)
                values = {"key_id": key_id, "day": day, "tokens": tokens}
                totals[key_id, day] = int(conn.execute(row, values).scalar_one())
            conn.execute(delete(key_tokens).where(key_tokens.c.day < max(day for _, day in used) - 1))
        return totals

    def tokens_of(self, day: int) -> dict[str, int]:
        """Each key's tokens of a day."""
        rows = select(key_tokens.c.key_id, key_tokens.c.tokens).where(key_tokens.c.day == day)
        with self._db.read() as conn:
            return {row.key_id: int(row.tokens) for row in conn.execute(rows)}

    def spend_judgement(self, key_id: str, limit: int, window_s: float) -> Spent:
        """Counts one more judgement of a key, unless it has `limit` within the last `window_s` seconds."""
        now = self._now()
        mine = key_judgements.c.key_id == key_id
        with self._db.write() as conn:
            self._db.lock(conn, JUDGEMENTS)
            conn.execute(delete(key_judgements).where(key_judgements.c.at <= now - window_s + CLOCK_GRAIN_S))
            in_the_way = select(key_judgements.c.at).where(mine).order_by(key_judgements.c.seq.desc())
            oldest = conn.execute(in_the_way.offset(limit - 1).limit(1)).scalar()
            if oldest is not None:
                return Spent(None, oldest + window_s - now)
            made = insert(key_judgements).returning(key_judgements.c.seq)
            return Spent(int(conn.execute(made, {"key_id": key_id, "at": now}).scalar_one()))

    def give_judgement_back(self, id_: int) -> None:
        """Takes back what `spend_judgement` counted: nothing came of it."""
        with self._db.write() as conn:
            conn.execute(delete(key_judgements).where(key_judgements.c.seq == id_))

    def judgements_spent(self, key_id: str, window_s: float) -> int:
        """How many judgements of a key count now."""
        since = self._now() - window_s + CLOCK_GRAIN_S
        rows = key_judgements.c.key_id == key_id, key_judgements.c.at > since
        with self._db.read() as conn:
            return int(conn.execute(select(func.count()).select_from(key_judgements).where(*rows)).scalar_one())
