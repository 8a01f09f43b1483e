"""Completions with their choices, images and metadata.

Comes in: `Completion` values from capture. Goes out: the same values, in pages by time.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, delete, exists, func, select, tuple_, update

from noria.errors import Conflict, NotFound
from noria.records import Choice, Completion, Image
from noria.store.connection import Database
from noria.store.tables import choices, completion_images, completion_metadata, completions, images

Order = Literal["asc", "desc"]
SOME = 500  # ids in one IN (...): below every database's limit


class PictureGone(Conflict):
    """A picture's blob was deleted between being put and being referred to. Raised by `add_completions`: put it again.

    Nothing of the batch is then written.
    """

    code = "picture_gone"


class Part:
    """What every part of the store stands on: the database and a clock (seconds since the epoch)."""

    def __init__(self, database: Database, clock: Any) -> None:
        self._db = database
        self._now = clock


class CompletionStore(Part):
    """The store's completions."""

    def add_completions(self, batch: Sequence[Completion], has_picture: Callable[[str], bool] | None = None) -> int:
        """Stores the batch in one transaction; returns how many were new. An id already stored stays as it is.

        `has_picture` is asked of the sha256 of every picture that no stored completion shows yet. Raises PictureGone
        where it says no: somebody who deletes pictures was quicker.
        """
        rows = {completion.id: completion for completion in batch}
        if not rows:
            return 0
        with self._db.write() as conn:
            statement = self._db.insert_new(completions).returning(completions.c.id)
            new = [rows[str(id_)] for id_ in conn.execute(statement, [_row(c) for c in rows.values()]).scalars()]
            _insert(conn, choices, [_choice_row(c.id, choice) for c in new for choice in c.choices])
            _insert(conn, completion_metadata, _metadata_rows({c.id: c.metadata for c in new}))
            pictures = {image.sha256: image for c in new for image in c.images}
            if pictures:
                self._db.lock(conn, "pictures")
                ordered = [vars(pictures[sha256]) for sha256 in sorted(pictures)]  # one order: writers cannot deadlock
                first = conn.execute(self._db.insert_new(images).returning(images.c.sha256), ordered).scalars().all()
                if has_picture is not None and not all(map(has_picture, first)):
                    raise PictureGone("a picture was deleted while its completion was being stored")
            _insert(conn, completion_images, [row for c in new for row in _image_rows(c)])
        return len(new)

    def get_completion(self, id_: str) -> Completion:
        """One completion. Raises NotFound."""
        with self._db.read() as conn:
            return _one(conn, id_)

    def list_completions(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "asc",
        metadata: Mapping[str, str] | None = None,
        model: str | None = None,
        end_user: str | None = None,
        key_id: str | None = None,
    ) -> list[Completion]:
        """A page by time, `after` the completion of that id; `metadata` must match in every given key.

        With `key_id`, those that were asked with that key. Raises NotFound where `after` is unknown.
        """
        at = (completions.c.created_at, completions.c.id)
        query = select(completions).limit(limit)
        for key, value in (metadata or {}).items():
            query = query.where(_has_metadata(key, value))
        if model is not None:
            query = query.where(completions.c.model == model)
        if end_user is not None:
            query = query.where(completions.c.end_user == end_user)
        if key_id is not None:
            query = query.where(completions.c.key_id == key_id)
        with self._db.read() as conn:
            if after is not None:
                cursor = conn.execute(select(*at).where(completions.c.id == after)).first()
                if cursor is None:
                    raise NotFound(f"after={after!r} is no stored completion", param="after")
                there = tuple_(*cursor)
                query = query.where(tuple_(*at) > there if order == "asc" else tuple_(*at) < there)
            query = query.order_by(*(c.asc() if order == "asc" else c.desc() for c in at))
            return load(conn, query)

    def recent_completions(self, limit: int, kind: Literal["any", "text", "vision"] = "any") -> list[Completion]:
        """The newest finished completions with an answer, newest first: all, without images, or with images."""
        pictured = exists().where(completion_images.c.completion_id == completions.c.id)
        answered = exists().where(choices.c.completion_id == completions.c.id, choices.c.text != "")
        query = select(completions).where(completions.c.finished.is_(True), answered)
        if kind != "any":
            query = query.where(pictured if kind == "vision" else ~pictured)
        query = query.order_by(completions.c.created_at.desc(), completions.c.id.desc()).limit(limit)
        with self._db.read() as conn:
            return load(conn, query)

    def count_completions(self) -> int:
        """How many completions are stored."""
        with self._db.read() as conn:
            return int(conn.execute(select(func.count()).select_from(completions)).scalar_one())

    def set_completion_metadata(self, id_: str, metadata: Mapping[str, str]) -> Completion:
        """Replaces the metadata; returns the completion. Raises NotFound."""
        with self._db.write() as conn:
            found = conn.execute(
                update(completions).where(completions.c.id == id_).values(metadata=dict(metadata))
            ).rowcount
            if not found:
                raise _unknown(id_)
            conn.execute(delete(completion_metadata).where(completion_metadata.c.completion_id == id_))
            _insert(conn, completion_metadata, _metadata_rows({id_: metadata}))
            return _one(conn, id_)

    def delete_completion(self, id_: str) -> list[str]:
        """Deletes a completion and every preference and feedback on it. Raises NotFound.

        Returns the sha256 of images that nothing refers to any more, for the caller to delete from the blobs.
        """
        with self._db.write() as conn:
            orphans = delete_all(self._db, conn, [id_])
            if orphans is None:
                raise _unknown(id_)
            return orphans


def load(conn: Connection, query: Select[Any]) -> list[Completion]:
    """Runs a query for rows of `completions` and adds what hangs on them, in two more queries however long the page."""
    rows = conn.execute(query).all()
    answers: dict[str, list[Choice]] = defaultdict(list)
    pictures: dict[str, list[Image]] = defaultdict(list)
    for ids in chunks([row.id for row in rows]):
        chosen = select(choices).where(choices.c.completion_id.in_(ids)).order_by(choices.c.index)
        for row in conn.execute(chosen):
            answers[row.completion_id].append(_choice(row))
        shown = (
            select(completion_images.c.completion_id, images)
            .join(images, images.c.sha256 == completion_images.c.sha256)
            .where(completion_images.c.completion_id.in_(ids))
            .order_by(completion_images.c.position)
        )
        for row in conn.execute(shown):
            pictures[row.completion_id].append(Image(row.sha256, row.media_type, row.size_bytes, row.width, row.height))
    return [_completion(row, answers[row.id], pictures[row.id]) for row in rows]


def delete_all(database: Database, conn: Connection, ids: Sequence[str]) -> list[str] | None:
    """Deletes completions by id; returns the images that became orphans, or None when no such completion was there."""
    database.lock(conn, "pictures")
    touched: set[str] = set()
    found = 0
    for some in chunks(ids):
        shown = select(completion_images.c.sha256).where(completion_images.c.completion_id.in_(some))
        touched.update(conn.execute(shown).scalars())
        found += conn.execute(delete(completions).where(completions.c.id.in_(some))).rowcount
    orphans: list[str] = []
    for some in chunks(sorted(touched)):
        used = exists().where(completion_images.c.sha256 == images.c.sha256)
        gone = delete(images).where(images.c.sha256.in_(some), ~used).returning(images.c.sha256)
        orphans += conn.execute(gone).scalars()
    return sorted(orphans) if found else None


def _one(conn: Connection, id_: str) -> Completion:
    found = load(conn, select(completions).where(completions.c.id == id_))
    if not found:
        raise _unknown(id_)
    return found[0]


def _unknown(id_: str) -> NotFound:
    return NotFound(f"no stored completion {id_!r}", param="completion_id")


def _has_metadata(key: str, value: str) -> Any:
    return exists().where(
        completion_metadata.c.completion_id == completions.c.id,
        completion_metadata.c.key == key,
        completion_metadata.c.value == value,
    )


def chunks(ids: Sequence[str]) -> list[Sequence[str]]:
    """The ids in pieces that fit one IN (...)."""
    return [ids[start : start + SOME] for start in range(0, len(ids), SOME)]


def _insert(conn: Connection, table: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        conn.execute(table.insert(), rows)


def _row(completion: Completion) -> dict[str, Any]:
    row = {key: value for key, value in vars(completion).items() if key not in ("choices", "images")}
    row["messages"] = list(completion.messages)
    return row


def _choice_row(completion_id: str, choice: Choice) -> dict[str, Any]:
    return {"completion_id": completion_id, **vars(choice)}


def _metadata_rows(of: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    return [
        {"completion_id": id_, "key": key, "value": value if isinstance(value, str) else json.dumps(value)}
        for id_, metadata in of.items()
        for key, value in metadata.items()
    ]


def _image_rows(completion: Completion) -> list[dict[str, Any]]:
    return [
        {"completion_id": completion.id, "position": position, "sha256": image.sha256}
        for position, image in enumerate(completion.images)
    ]


def _choice(row: Row[Any]) -> Choice:
    values = row._mapping
    return Choice(
        index=values["index"],
        text=values["text"],
        message=values["message"],
        token_ids=values["token_ids"],
        logprobs=values["logprobs"],
        finish_reason=values["finish_reason"],
    )


def _completion(row: Row[Any], answers: list[Choice], pictures: list[Image]) -> Completion:
    values = dict(row._mapping)
    values["messages"] = tuple(values["messages"])
    return Completion(**values, choices=tuple(answers), images=tuple(pictures))
