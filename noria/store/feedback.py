"""Feedback on single choices, and forgetting everything of one end user.

Comes in: ratings, thumbs, edits, comments. Goes out: `Feedback` values; counts of what was forgotten.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from sqlalchemy import delete, func, or_, select

from noria.errors import InvalidRequest, NotFound
from noria.records import Feedback, Json, Side
from noria.store.completions import Order, Part, delete_all
from noria.store.preferences import PAGE, choice_row, insert_preference, page, used_by_a_job
from noria.store.privacy import lineage
from noria.store.tables import choices, completions, feedback, preferences


class FeedbackStore(Part):
    """The store's feedback."""

    def add_feedback(
        self,
        completion_id: str,
        index: int,
        rating: int | None = None,
        thumb: Literal["up", "down"] | None = None,
        edit: str | None = None,
        comment: str | None = None,
        annotator: str | None = None,
    ) -> Feedback:
        """Records feedback; an edit also becomes a preference (edited over original) in the same transaction.

        Raises NotFound for an unknown completion, InvalidRequest for an index out of range, no content, a rating
        outside 1..5, another thumb than up or down, or an edit that changes nothing.
        """
        _check(rating, thumb, edit, comment)
        with self._db.write() as conn:
            if conn.execute(select(completions.c.id).where(completions.c.id == completion_id)).first() is None:
                message = f"completion_id: no stored completion {completion_id!r}"
                raise NotFound(message, param="completion_id", code="completion_not_found")
            original = choice_row(conn, completion_id, index, "index")
            preference_id = None
            now = self._now()
            if edit is not None:
                if edit == original.text:
                    raise InvalidRequest("edit is the same text as the answer", param="edit", code="same_answer")
                sides = Side(text=edit), Side(completion_id=completion_id, index=index)
                made, _ = insert_preference(self._db, conn, now, *sides, "chosen", annotator, comment, "edit")
                preference_id = made.id
            said = Feedback(
                id="fb_" + secrets.token_hex(12),
                created_at=now,
                completion_id=completion_id,
                index=index,
                rating=rating,
                thumb=thumb,
                edit=edit,
                comment=comment,
                annotator=annotator,
                preference_id=preference_id,
            )
            conn.execute(feedback.insert(), vars(said))
        return said

    def import_feedback(self, said: Feedback) -> bool:
        """Takes in feedback that another store exported; its id and time stay. False when that id is here already.

        Raises what add_feedback raises; NotFound too for a preference that is not here.
        """
        _check(said.rating, said.thumb, said.edit, said.comment)
        with self._db.write() as conn:
            if conn.execute(select(feedback.c.id).where(feedback.c.id == said.id)).first() is not None:
                return False
            if conn.execute(select(completions.c.id).where(completions.c.id == said.completion_id)).first() is None:
                message = f"completion_id: no stored completion {said.completion_id!r}"
                raise NotFound(message, param="completion_id", code="completion_not_found")
            choice_row(conn, said.completion_id, said.index, "index")
            made = said.preference_id
            if (
                made is not None
                and conn.execute(select(preferences.c.id).where(preferences.c.id == made)).first() is None
            ):
                raise NotFound(f"preference_id: no preference {made!r}", param="preference_id")
            conn.execute(feedback.insert(), vars(said))
            return True

    def iter_feedback(self) -> Iterator[Feedback]:
        """All feedback, oldest first, read in pages so that nothing is held open between two of them."""
        after = 0
        while True:
            query = select(feedback).where(feedback.c.seq > after).order_by(feedback.c.seq).limit(PAGE)
            with self._db.read() as conn:
                rows = conn.execute(query).all()
            if not rows:
                return
            yield from map(_feedback, rows)
            after = rows[-1].seq

    def get_feedback(self, id_: str) -> Feedback:
        """One feedback. Raises NotFound."""
        with self._db.read() as conn:
            row = conn.execute(select(feedback).where(feedback.c.id == id_)).first()
        if row is None:
            raise _unknown(id_)
        return _feedback(row)

    def list_feedback(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        completion_id: str | None = None,
        annotator: str | None = None,
    ) -> list[Feedback]:
        """A page in the order of recording, `after` the feedback of that id (NotFound where it is unknown)."""
        query = select(feedback)
        if completion_id is not None:
            query = query.where(feedback.c.completion_id == completion_id)
        if annotator is not None:
            query = query.where(feedback.c.annotator == annotator)
        with self._db.read() as conn:
            return [_feedback(row) for row in conn.execute(page(conn, query, feedback, after, limit, order))]

    def thumb_counts(self) -> dict[str, int]:
        """`total` of feedback with a thumb, and `unused`: those that no job has used, as of preferences."""
        total = select(func.count()).select_from(feedback).where(feedback.c.thumb.is_not(None))
        with self._db.read() as conn:
            unused = conn.execute(total.where(~used_by_a_job(feedback))).scalar_one()
            return {"total": conn.execute(total).scalar_one(), "unused": unused}

    def delete_feedback(self, id_: str) -> None:
        """Deletes feedback, and the preference that its edit made unless other feedback made it too."""
        with self._db.write() as conn:
            gone = delete(feedback).where(feedback.c.id == id_).returning(feedback.c.preference_id)
            row = conn.execute(gone).first()
            if row is None:
                raise _unknown(id_)
            if row.preference_id is not None:
                others = select(feedback.c.id).where(feedback.c.preference_id == row.preference_id)
                if conn.execute(others).first() is None:
                    mine = preferences.c.id == row.preference_id, preferences.c.source == "edit"
                    conn.execute(delete(preferences).where(*mine))

    def forget_end_user(self, user: str) -> Json:
        """Deletes all that came from one end user: completions, all that hangs on them, and what the user judged.

        Returns counts (`completions`, `choices`, `preferences`, `feedback`); `images`: the sha256 of images that
        nothing refers to any more, for the caller to drop from the blobs; `lineage`: which versions learnt from what
        is deleted here, and which unfinished jobs had it in their snapshots (docs/privacy.md). The versions stay
        marked; the user's name stays nowhere.
        """
        with self._db.write() as conn:
            theirs = select(completions.c.id).where(completions.c.end_user == user)
            ids = list(conn.execute(theirs).scalars())
            said = or_(feedback.c.annotator == user, feedback.c.completion_id.in_(theirs))
            judged = or_(
                preferences.c.annotator == user,
                preferences.c.chosen_completion_id.in_(theirs),
                preferences.c.rejected_completion_id.in_(theirs),
            )
            judgements = [select(preferences.c.id).where(judged), select(feedback.c.id).where(said)]
            used = lineage.lineage_of(conn, [theirs, *judgements])
            told = lineage.told(conn, used)
            counts = {"completions": len(ids), "choices": _count(conn, choices, choices.c.completion_id.in_(theirs))}
            # Feedback first: a preference's deletion would set its reference to NULL row by row.
            n_feedback = conn.execute(delete(feedback).where(said)).rowcount
            counts["preferences"] = conn.execute(delete(preferences).where(judged)).rowcount
            counts["feedback"] = n_feedback
            images = delete_all(self._db, conn, ids) or []
            if any(counts.values()):
                lineage.mark(self._db, conn, self._now(), user, counts, used)
        self._db.empty_log()
        return {**counts, "images": images, "lineage": told}


def _count(conn: Any, table: Any, condition: Any) -> int:
    return int(conn.execute(select(func.count()).select_from(table).where(condition)).scalar_one())


def _check(rating: int | None, thumb: str | None, edit: str | None, comment: str | None) -> None:
    if rating is None and thumb is None and edit is None and comment is None:
        raise InvalidRequest("feedback needs at least one of rating, thumb, edit, comment", param="rating")
    if rating is not None and not 1 <= rating <= 5:
        raise InvalidRequest(f"rating={rating} is out of range: 1 to 5", param="rating")
    if thumb not in (None, "up", "down"):
        raise InvalidRequest(f"thumb is {thumb!r}; it must be up or down", param="thumb")
    if edit is not None and not edit.strip():
        raise InvalidRequest("edit is empty", param="edit")


def _feedback(row: Any) -> Feedback:
    return Feedback(**{key: value for key, value in row._mapping.items() if key != "seq"})


def _unknown(id_: str) -> NotFound:
    return NotFound(f"no feedback {id_!r}", param="feedback_id")
