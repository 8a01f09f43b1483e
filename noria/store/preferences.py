"""Preferences: chosen over rejected over one prompt, checked and made durable in one transaction.

Comes in: two sides and what a person said of them. Goes out: `Preference` values.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Row, Select, Table, and_, delete, exists, func, select

from noria.errors import InvalidRequest, NotFound
from noria.records import Json, Preference, Side, Verdict
from noria.store.completions import Order, Part
from noria.store.connection import Database
from noria.store.tables import choices, completions, jobs, preferences, snapshot_items, snapshot_jobs

Source = Literal["preference", "edit"]
PAGE = 500


@dataclass(frozen=True)
class _Answer:
    """One side, looked up: `prompt_hash` is None for a text of the annotator's own."""

    side: Side
    text: str
    tool_calls: str
    prompt_hash: str | None


class PreferenceStore(Part):
    """The store's preferences."""

    def add_preference(
        self,
        chosen: Side,
        rejected: Side,
        verdict: Verdict = "chosen",
        annotator: str | None = None,
        comment: str | None = None,
        source: Source = "preference",
    ) -> tuple[Preference, bool]:
        """Records one preference; it is on the disk when this returns. The flag says whether it is new.

        The annotator's newest word on the same two answers, said again, gives the preference that exists. A different
        word (the other way round, a tie) is a new one; the newest counts.
        Raises NotFound for an unknown completion, InvalidRequest for an index out of range, two texts without a
        completion, equal sides, or different prompts; `param` names the field.
        """
        with self._db.write() as conn:
            return insert_preference(self._db, conn, self._now(), chosen, rejected, verdict, annotator, comment, source)

    def import_preference(self, preference: Preference) -> bool:
        """Takes in a preference that another store exported; its id and time stay. False when that id is here already.

        Raises what add_preference raises.
        """
        chosen, rejected = preference.chosen, preference.rejected
        with self._db.write() as conn:
            if conn.execute(select(preferences.c.id).where(preferences.c.id == preference.id)).first() is not None:
                return False
            _lock_completions(self._db, conn, chosen, rejected)
            first, second = _look_up(conn, chosen, "chosen"), _look_up(conn, rejected, "rejected")
            _check(first, second, preference.verdict)
            conn.execute(preferences.insert(), _row(preference, _pair_key(chosen, rejected)))
            return True

    def get_preference(self, id_: str) -> Preference:
        """One preference. Raises NotFound."""
        with self._db.read() as conn:
            row = conn.execute(select(preferences).where(preferences.c.id == id_)).first()
        if row is None:
            raise _unknown(id_)
        return preference_of(row)

    def list_preferences(
        self, *, after: str | None = None, limit: int = 20, order: Order = "desc", annotator: str | None = None
    ) -> list[Preference]:
        """A page in the order of recording, `after` the preference of that id (NotFound where it is unknown)."""
        query = select(preferences)
        if annotator is not None:
            query = query.where(preferences.c.annotator == annotator)
        with self._db.read() as conn:
            query = page(conn, query, preferences, after, limit, order)
            return [preference_of(row) for row in conn.execute(query)]

    def iter_preferences(self) -> Iterator[Preference]:
        """Every preference, oldest first, read in pages so that nothing is held open between two of them."""
        after = 0
        while True:
            query = select(preferences).where(preferences.c.seq > after).order_by(preferences.c.seq).limit(PAGE)
            with self._db.read() as conn:
                rows = conn.execute(query).all()
            if not rows:
                return
            yield from (preference_of(row) for row in rows)
            after = rows[-1].seq

    def delete_preference(self, id_: str) -> None:
        """Deletes one preference. Raises NotFound."""
        with self._db.write() as conn:
            if not conn.execute(delete(preferences).where(preferences.c.id == id_)).rowcount:
                raise _unknown(id_)

    def preference_counts(self) -> dict[str, int]:
        """`total`, and `unused`: those that could train (verdict chosen) and that no job has used.

        A job uses what stands in its snapshot (in any part), once it runs or has succeeded.
        """
        total = select(func.count()).select_from(preferences)
        unused = total.where(preferences.c.verdict == "chosen", ~used_by_a_job())
        with self._db.read() as conn:
            return {"total": conn.execute(total).scalar_one(), "unused": conn.execute(unused).scalar_one()}


def used_by_a_job(judgements: Table = preferences) -> Any:
    """SQL condition on `preferences` or `feedback`: in the snapshot of a job that runs or has succeeded."""
    return (
        exists()
        .where(
            snapshot_items.c.preference_id == judgements.c.id,
            snapshot_jobs.c.snapshot_id == snapshot_items.c.snapshot_id,
            jobs.c.id == snapshot_jobs.c.job_id,
            jobs.c.state.in_(("running", "succeeded")),
        )
        .correlate(judgements)
    )


def insert_preference(
    database: Database,
    conn: Connection,
    now: float,
    chosen: Side,
    rejected: Side,
    verdict: Verdict,
    annotator: str | None,
    comment: str | None,
    source: Source,
) -> tuple[Preference, bool]:
    """Checks and inserts within a transaction that the caller holds; feedback's edits come this way too."""
    if verdict not in get_args(Verdict):
        raise InvalidRequest(f"verdict is {verdict!r}; it must be chosen, tie or both_bad", param="verdict")
    _lock_completions(database, conn, chosen, rejected)
    first, second = _look_up(conn, chosen, "chosen"), _look_up(conn, rejected, "rejected")
    prompt_hash = _check(first, second, verdict)
    pair_key = _pair_key(chosen, rejected)
    existing = _newest(conn, pair_key, annotator)
    if existing is not None and _says_the_same(existing, chosen, verdict):
        return existing, False
    made = Preference(
        id="pref_" + secrets.token_hex(12),
        created_at=now,
        prompt_hash=prompt_hash,
        chosen=chosen,
        rejected=rejected,
        verdict=verdict,
        annotator=annotator,
        comment=comment,
        source=source,
    )
    conn.execute(preferences.insert(), _row(made, pair_key))
    return made, True


def page(conn: Connection, query: Select[Any], table: Any, after: str | None, limit: int, order: Order) -> Select[Any]:
    """Limits `query` to the page that follows the row with id `after`, in the order in which rows were inserted."""
    if after is not None:
        seq = conn.execute(select(table.c.seq).where(table.c.id == after)).scalar()
        if seq is None:
            raise NotFound(f"after={after!r} is not in {table.name}", param="after")
        query = query.where(table.c.seq > seq if order == "asc" else table.c.seq < seq)
    return query.order_by(table.c.seq.asc() if order == "asc" else table.c.seq.desc()).limit(limit)


def preference_of(row: Row[Any]) -> Preference:
    """A row of `preferences` as a value."""
    return Preference(
        id=row.id,
        created_at=row.created_at,
        prompt_hash=row.prompt_hash,
        chosen=Side(row.chosen_completion_id, row.chosen_index, row.chosen_text),
        rejected=Side(row.rejected_completion_id, row.rejected_index, row.rejected_text),
        verdict=row.verdict,
        annotator=row.annotator,
        comment=row.comment,
        source=row.source,
    )


def _lock_completions(database: Database, conn: Connection, *sides: Side) -> None:
    """Two annotations of one pair at once must queue. SQLite's writers do already."""
    ids = sorted({side.completion_id for side in sides if side.completion_id is not None})
    if ids and not database.is_sqlite:
        rows = select(completions.c.id).where(completions.c.id.in_(ids)).order_by(completions.c.id)
        conn.execute(rows.with_for_update(key_share=True)).all()


def _look_up(conn: Connection, side: Side, name: str) -> _Answer:
    if side.completion_id is None:
        if side.text is None or not side.text.strip():
            raise InvalidRequest(f"{name} needs either completion_id and index, or a text", param=name)
        return _Answer(side, side.text, "", None)
    if side.text is not None:
        raise InvalidRequest(f"{name} has both a completion_id and a text: give one of the two", param=name)
    prompt = select(completions.c.prompt_hash).where(completions.c.id == side.completion_id)
    prompt_hash = conn.execute(prompt).scalar()
    if prompt_hash is None:
        message = f"{name}.completion_id: no stored completion {side.completion_id!r}"
        raise NotFound(message, param=f"{name}.completion_id", code="completion_not_found")
    row = choice_row(conn, side.completion_id, side.index, f"{name}.index")
    calls = row.message.get("tool_calls")
    return _Answer(side, row.text, json.dumps(calls, sort_keys=True) if calls else "", prompt_hash)


def choice_row(conn: Connection, completion_id: str, index: int | None, param: str) -> Any:
    """The text and message of one choice. Raises InvalidRequest, naming `param` and both numbers."""
    if index is None:
        raise InvalidRequest(f"{param} is missing: which choice of {completion_id!r} is meant?", param=param)
    wanted = select(choices.c.text, choices.c.message).where(
        choices.c.completion_id == completion_id, choices.c.index == index
    )
    # Beyond int32 the database itself would refuse the number.
    row = conn.execute(wanted).first() if 0 <= index < 2**31 else None
    if row is None:
        count = select(func.count()).select_from(choices).where(choices.c.completion_id == completion_id)
        n = conn.execute(count).scalar_one()
        message = f"{param}={index} is out of range: {completion_id!r} has {n} choice{'' if n == 1 else 's'}"
        raise InvalidRequest(message, param=param, code="index_out_of_range")
    return row


def _check(chosen: _Answer, rejected: _Answer, verdict: Verdict) -> str:
    """What two sides must satisfy together; returns the prompt's hash."""
    prompt_hash = chosen.prompt_hash or rejected.prompt_hash
    if prompt_hash is None:
        raise InvalidRequest("one of chosen and rejected must name a completion_id", param="chosen.completion_id")
    if None not in (chosen.prompt_hash, rejected.prompt_hash) and chosen.prompt_hash != rejected.prompt_hash:
        message = "chosen and rejected answer different prompts: a preference compares two answers to one prompt"
        raise InvalidRequest(message, param="rejected.completion_id", code="different_prompts")
    if chosen.side == rejected.side:
        raise InvalidRequest("chosen and rejected are the same answer", param="rejected", code="same_answer")
    same = chosen.text == rejected.text and chosen.tool_calls == rejected.tool_calls
    if same and verdict == "chosen":
        message = "chosen and rejected have the same text: say verdict tie or both_bad, or judge other answers"
        raise InvalidRequest(message, param="rejected", code="same_answer")
    return prompt_hash


def _pair_key(one: Side, other: Side) -> str:
    """The same for the two sides in either order."""
    sides = sorted(json.dumps([side.completion_id, side.index, side.text]) for side in (one, other))
    return hashlib.sha256("\n".join(sides).encode()).hexdigest()


def _newest(conn: Connection, pair_key: str, annotator: str | None) -> Preference | None:
    by = preferences.c.annotator.is_(None) if annotator is None else preferences.c.annotator == annotator
    query = select(preferences).where(and_(preferences.c.pair_key == pair_key, by))
    row = conn.execute(query.order_by(preferences.c.seq.desc()).limit(1)).first()
    return None if row is None else preference_of(row)


def _says_the_same(existing: Preference, chosen: Side, verdict: Verdict) -> bool:
    """For a tie or both bad the order of the sides says nothing."""
    return existing.verdict == verdict and (verdict != "chosen" or existing.chosen == chosen)


def _row(preference: Preference, pair_key: str) -> Json:
    row = dict(vars(preference), pair_key=pair_key)
    for name in ("chosen", "rejected"):
        side: Side = row.pop(name)
        row |= {f"{name}_completion_id": side.completion_id, f"{name}_index": side.index, f"{name}_text": side.text}
    return row


def _unknown(id_: str) -> NotFound:
    return NotFound(f"no preference {id_!r}", param="preference_id")
