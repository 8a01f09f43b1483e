"""Which completions are past retention, and their deletion, a small batch to a transaction.

Comes in: an age, a number. Goes out: counts, and the pictures that nothing refers to any more.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, exists, func, or_, select, tuple_

from noria.store.completions import Part, delete_all
from noria.store.tables import completions, feedback, preferences


@dataclass(frozen=True)
class Limits:
    """What is past retention: older than `before` (seconds since the epoch), or at `cut` (time, id) and before it."""

    before: float | None = None
    cut: tuple[float, str] | None = None
    keep_judged: bool = True


@dataclass(frozen=True)
class Pruned:
    """What one batch took, or would take; `images` are sha256 of pictures that the blobs may delete."""

    completions: int = 0
    preferences: int = 0
    feedback: int = 0
    images: tuple[str, ...] = ()


class RetentionStore(Part):
    """The store's retention."""

    def limits(self, days: float | None, count: int | None, keep_judged: bool) -> Limits:
        """What these words mean now. Judged completions do not count towards `count` where they are kept."""
        before = None if days is None else self._now() - days * 86400.0
        cut = None
        if count is not None:
            at = (completions.c.created_at, completions.c.id)
            query = select(*at).order_by(*(column.desc() for column in at)).offset(count).limit(1)
            with self._db.read() as conn:
                row = conn.execute(query.where(~_judged()) if keep_judged else query).first()
            cut = None if row is None else (row.created_at, row.id)
        return Limits(before, cut, keep_judged)

    def count_expired(self, limits: Limits) -> Pruned:
        """How much a prune would take now, all batches together; the pictures are not reckoned."""
        if limits.before is None and limits.cut is None:
            return Pruned()
        gone = _expired(limits)
        with self._db.read() as conn:
            total = conn.execute(select(func.count()).select_from(gone.subquery())).scalar_one()
            return Pruned(int(total), *_hanging(conn, gone))

    def prune(self, limits: Limits, batch: int) -> Pruned:
        """Deletes up to `batch` completions, the oldest first, and what hangs on them, in one transaction."""
        if limits.before is None and limits.cut is None:
            return Pruned()
        oldest = _expired(limits).order_by(completions.c.created_at, completions.c.id).limit(batch)
        with self._db.read() as conn:  # most rounds find nothing: do not begin a write for it
            if conn.execute(oldest.limit(1)).first() is None:
                return Pruned()
        with self._db.write() as conn:
            ids = list(conn.execute(oldest).scalars())
            if not self._db.is_sqlite:  # somebody may be judging one of them: wait for that, then look again
                rows = select(completions.c.id).where(completions.c.id.in_(ids)).order_by(completions.c.id)
                conn.execute(rows.with_for_update()).all()
                ids = list(conn.execute(_expired(limits).where(completions.c.id.in_(ids))).scalars())
            if not ids:
                return Pruned()
            judged = _hanging(conn, select(completions.c.id).where(completions.c.id.in_(ids)))
            images = delete_all(self._db, conn, ids) or []
            return Pruned(len(ids), *judged, tuple(images))


def _expired(limits: Limits) -> Select[Any]:
    """Ids of what is past the limits."""
    past = []
    if limits.before is not None:
        past.append(completions.c.created_at < limits.before)
    if limits.cut is not None:
        past.append(tuple_(completions.c.created_at, completions.c.id) <= tuple_(*limits.cut))
    query = select(completions.c.id).where(or_(*past))
    return query.where(~_judged()) if limits.keep_judged else query


def _judged() -> Any:
    """SQL condition: a preference or feedback refers to the completion."""
    chosen = exists().where(preferences.c.chosen_completion_id == completions.c.id)
    rejected = exists().where(preferences.c.rejected_completion_id == completions.c.id)
    said = exists().where(feedback.c.completion_id == completions.c.id)
    return or_(chosen, rejected, said)


def _hanging(conn: Connection, ids: Select[Any]) -> tuple[int, int]:
    """How many preferences and how much feedback refer to completions of these ids."""
    refers = or_(preferences.c.chosen_completion_id.in_(ids), preferences.c.rejected_completion_id.in_(ids))
    judged = conn.execute(select(func.count()).select_from(preferences).where(refers)).scalar_one()
    said = select(func.count()).select_from(feedback).where(feedback.c.completion_id.in_(ids))
    return int(judged), int(conn.execute(said).scalar_one())
