"""What training reads: preferences resolved into pairs of texts, thumbs with the answer they are about, and the
snapshots that freeze a choice of either.

Comes in: preferences, feedback, completions, `Snapshot` values. Goes out: (Preference, Pair) rows, thumbs, snapshots.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, ColumnElement, FromClause, Row, func, select

from noria.errors import NotFound
from noria.records import Json, Pair, Preference, Snapshot, Thumb, image_references
from noria.store.completions import Part
from noria.store.preferences import preference_of, used_by_a_job
from noria.store.tables import choices, completions, feedback, preferences, snapshot_items, snapshot_jobs, snapshots

PARTS = ("train", "held_out", "left_out")


class PairStore(Part):
    """The store's training pairs and snapshots."""

    def training_pairs(self, exclude_used: bool = False) -> list[tuple[Preference, Pair | None]]:
        """Every preference, oldest first, with its pair; None where the verdict is not `chosen`.

        `exclude_used` leaves out what stands in the snapshot of a job that runs or has succeeded.
        """
        prompt, first, second = completions.alias("prompt"), choices.alias("first"), choices.alias("second")
        named = func.coalesce(preferences.c.chosen_completion_id, preferences.c.rejected_completion_id)
        query = (
            select(
                preferences,
                prompt.c.messages,
                func.coalesce(preferences.c.chosen_text, first.c.text).label("chosen"),
                func.coalesce(preferences.c.rejected_text, second.c.text).label("rejected"),
                _cut(preferences.c.chosen_text, first).label("chosen_cut"),
                _cut(preferences.c.rejected_text, second).label("rejected_cut"),
            )
            .join(prompt, prompt.c.id == named)
            .outerjoin(
                first,
                (first.c.completion_id == preferences.c.chosen_completion_id)
                & (first.c.index == preferences.c.chosen_index),
            )
            .outerjoin(
                second,
                (second.c.completion_id == preferences.c.rejected_completion_id)
                & (second.c.index == preferences.c.rejected_index),
            )
            .order_by(preferences.c.seq)
        )
        if exclude_used:
            query = query.where(~used_by_a_job())
        with self._db.read() as conn:
            return [(preference_of(row), _pair(row)) for row in conn.execute(query)]

    def training_thumbs(self, exclude_used: bool = False) -> list[Thumb]:
        """Every feedback with a thumb, oldest first, with the answer that it is about; `exclude_used` as for pairs."""
        named = (choices.c.completion_id == feedback.c.completion_id) & (choices.c.index == feedback.c.index)
        query = (
            select(
                feedback,
                completions.c.messages,
                completions.c.prompt_hash,
                choices.c.text,
                choices.c.finish_reason,
            )
            .join(completions, completions.c.id == feedback.c.completion_id)
            .join(choices, named)
            .where(feedback.c.thumb.is_not(None))
            .order_by(feedback.c.seq)
        )
        if exclude_used:
            query = query.where(~used_by_a_job(feedback))
        with self._db.read() as conn:
            return [_thumb(row) for row in conn.execute(query)]

    def add_snapshot(self, snapshot: Snapshot) -> None:
        """Stores a snapshot and notes that its job uses it. The same content again only adds the job."""
        row = {key: getattr(snapshot, key) for key in ("id", "created_at", "job_id", "counts")}
        with self._db.write() as conn:
            if conn.execute(self._db.insert_new(snapshots).returning(snapshots.c.id), [row]).all():
                items = list(_items(snapshot))
                if items:
                    conn.execute(snapshot_items.insert(), items)
            used = {"snapshot_id": snapshot.id, "job_id": snapshot.job_id}
            conn.execute(self._db.insert_new(snapshot_jobs), [used])

    def get_snapshot(self, id_: str) -> Snapshot:
        """One snapshot. Raises NotFound."""
        with self._db.read() as conn:
            row = conn.execute(select(snapshots).where(snapshots.c.id == id_)).first()
            if row is None:
                raise NotFound(f"no snapshot {id_!r}", param="snapshot")
            query = select(snapshot_items).where(snapshot_items.c.snapshot_id == id_)
            parts: dict[str, list[str]] = {part: [] for part in PARTS}
            for item in conn.execute(query.order_by(snapshot_items.c.position)):
                parts[item.part].append(item.preference_id)
        ids = {part: tuple(found) for part, found in parts.items()}
        return Snapshot(id=row.id, job_id=row.job_id, created_at=row.created_at, counts=row.counts, **ids)


def _pair(row: Row[Any]) -> Pair | None:
    if row.verdict != "chosen" or row.chosen is None or row.rejected is None:
        return None
    return Pair(
        preference_id=row.id,
        prompt_hash=row.prompt_hash,
        messages=tuple(row.messages),
        chosen=row.chosen,
        rejected=row.rejected,
        created_at=row.created_at,
        annotator=row.annotator,
        images=image_references(row.messages),
        chosen_cut=bool(row.chosen_cut),
        rejected_cut=bool(row.rejected_cut),
    )


def _thumb(row: Row[Any]) -> Thumb:
    return Thumb(
        feedback_id=row.id,
        prompt_hash=row.prompt_hash,
        messages=tuple(row.messages),
        answer=row.text,
        up=row.thumb == "up",
        created_at=row.created_at,
        annotator=row.annotator,
        images=image_references(row.messages),
        cut=row.finish_reason == "length",
    )


def _cut(edited: Column[str], choice: FromClause) -> ColumnElement[bool]:
    """Whether a side is an answer that its limit of tokens ended. What a person wrote is whole."""
    return edited.is_(None) & (func.coalesce(choice.c.finish_reason, "") == "length")


def _items(snapshot: Snapshot) -> Iterable[Json]:
    for part in PARTS:
        for position, id_ in enumerate(getattr(snapshot, part)):
            yield {"snapshot_id": snapshot.id, "part": part, "position": position, "preference_id": id_}
