"""The tables of the store, as SQLAlchemy Core describes them; the migrations build the same ones.

Comes in: nothing. Goes out: `metadata`, one `Table` a noun, and the column types that they share.
Nothing here belongs to one database: SQLite and PostgreSQL get the same columns.
Must not import torch, vllm, fastapi or any other module of the store.

Texts and JSON are plain TEXT. We never query inside JSON, and escaped JSON survives what a client may send
(NUL characters, lone surrogates) on both databases.
"""

from __future__ import annotations

import json
import sys
from array import array
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeDecorator


class Words(TypeDecorator[str]):
    """Text from people and models. NUL and lone surrogates, which PostgreSQL or UTF-8 refuse, become U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Makes the text one that every database stores."""
        if value is None or (value.isascii() and "\0" not in value):
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


class JsonText(TypeDecorator[Any]):
    """Plain JSON values as compact ASCII text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Value to text; None stays SQL's NULL."""
        return None if value is None else json.dumps(value, separators=(",", ":"), default=str)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Text to value."""
        return None if value is None else json.loads(value)


class Packed(TypeDecorator[tuple[Any, ...]]):
    """A tuple of numbers as little-endian bytes: `typecode` q is int64, d is float64; values come back exact."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, typecode: str) -> None:
        super().__init__()
        self.typecode = typecode

    def process_bind_param(self, value: tuple[Any, ...] | None, dialect: Dialect) -> bytes | None:
        """Numbers to bytes."""
        return None if value is None else _little_endian(array(self.typecode, value)).tobytes()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[Any, ...] | None:
        """Bytes to numbers."""
        if value is None:
            return None
        numbers = array(self.typecode)
        numbers.frombytes(bytes(value))
        return tuple(_little_endian(numbers))


def _little_endian(numbers: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _seq() -> Column[int]:
    """Insertion order: what lists page by, and what "newest" means even within one clock tick."""
    return Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


def _of_completion(name: str, nullable: bool = False, **kwargs: Any) -> Column[str]:
    return Column(name, Words, ForeignKey("completions.id", ondelete="CASCADE"), nullable=nullable, **kwargs)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

completions = Table(
    "completions",
    metadata,
    Column("id", Words, primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("model", Words, nullable=False),
    Column("model_version", Words, nullable=False),
    Column("messages", JsonText, nullable=False),
    Column("params", JsonText, nullable=False),
    Column("prompt_hash", Words, nullable=False, index=True),
    Column("prompt_token_ids", Packed("q"), nullable=False),
    Column("end_user", Words, index=True),
    Column("key_id", Words, index=True),
    Column("metadata", JsonText, nullable=False),
    Column("usage", JsonText, nullable=False),
    Column("system_fingerprint", Words),
    Column("ttft_s", Double),
    Column("duration_s", Double),
    Column("finished", Boolean, nullable=False),
    Index("ix_completions_created_at_id", "created_at", "id"),
)

completion_metadata = Table(
    "completion_metadata",
    metadata,
    _of_completion("completion_id", primary_key=True),
    Column("key", Words, primary_key=True),
    Column("value", Words, nullable=False),
    Index("ix_completion_metadata_key_value", "key", "value"),
)

choices = Table(
    "choices",
    metadata,
    _of_completion("completion_id", primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("text", Words, nullable=False),
    Column("message", JsonText, nullable=False),
    Column("token_ids", Packed("q"), nullable=False),
    Column("logprobs", Packed("d"), nullable=False),
    Column("finish_reason", Words),
)

images = Table(
    "images",
    metadata,
    Column("sha256", Words, primary_key=True),
    Column("media_type", Words, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("width", Integer),
    Column("height", Integer),
)

completion_images = Table(
    "completion_images",
    metadata,
    _of_completion("completion_id", primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("sha256", Words, ForeignKey("images.sha256"), nullable=False, index=True),
)

preferences = Table(
    "preferences",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
    Column("prompt_hash", Words, nullable=False, index=True),
    _of_completion("chosen_completion_id", nullable=True, index=True),
    Column("chosen_index", Integer),
    Column("chosen_text", Words),
    _of_completion("rejected_completion_id", nullable=True, index=True),
    Column("rejected_index", Integer),
    Column("rejected_text", Words),
    Column("verdict", Words, nullable=False),
    Column("annotator", Words, index=True),
    Column("comment", Words),
    Column("source", Words, nullable=False),
    Column("pair_key", Words, nullable=False, index=True),
)

feedback = Table(
    "feedback",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
    _of_completion("completion_id", index=True),
    Column("index", Integer, nullable=False),
    Column("rating", Integer),
    Column("thumb", Words),
    Column("edit", Words),
    Column("comment", Words),
    Column("annotator", Words, index=True),
    Column("preference_id", Words, ForeignKey("preferences.id", ondelete="SET NULL"), index=True),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", Words, primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("job_id", Words, nullable=False),
    Column("counts", JsonText, nullable=False),
)

# `preference_id` has no foreign key: a snapshot keeps its ids when a preference is deleted later. In the snapshot of a
# job that learns from thumbs it is a feedback's id; the two kinds of ids differ.
snapshot_items = Table(
    "snapshot_items",
    metadata,
    Column("snapshot_id", Words, ForeignKey("snapshots.id", ondelete="CASCADE"), primary_key=True),
    Column("part", Words, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("preference_id", Words, nullable=False, index=True),
)

# Two jobs over unchanged data share one snapshot (its id is its content), so the jobs that used it are listed apart.
snapshot_jobs = Table(
    "snapshot_jobs",
    metadata,
    Column("snapshot_id", Words, ForeignKey("snapshots.id", ondelete="CASCADE"), primary_key=True),
    Column("job_id", Words, primary_key=True, index=True),
)

jobs = Table(
    "jobs",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("method", Words, nullable=False),
    Column("state", Words, nullable=False, index=True),
    Column("stage", Words, nullable=False),
    Column("progress", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("settings", JsonText, nullable=False),
    Column("rollout", Words, nullable=False),
    Column("metrics", JsonText, nullable=False),
    Column("version", Words),
    Column("error", JsonText),
    Column("done", JsonText, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("owner", Words),
    Column("lease_until", Double),
    Column("heartbeat_at", Double),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("cancel_requested", Boolean, nullable=False),
    Column("reason", Words, nullable=False),
    Column("event_seq", Integer, nullable=False),
)

# The database itself refuses a second running job.
Index(
    "uq_jobs_one_running",
    jobs.c.state,
    unique=True,
    sqlite_where=text("state = 'running'"),
    postgresql_where=text("state = 'running'"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", Words, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("kind", Words, nullable=False),
    Column("data", JsonText, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("parent", Words),
    Column("state", Words, nullable=False),
    Column("method", Words, nullable=False),
    Column("job", Words, index=True),
    Column("created_at", Double, nullable=False),
    Column("metrics", JsonText, nullable=False),
    Column("frozen", JsonText, nullable=False),
    Column("manifest_sha256", Words),
)

rollouts = Table(
    "rollouts",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("version", Words, ForeignKey("versions.id"), nullable=False),
    Column("previous", Words),
    Column("strategy", Words, nullable=False),
    Column("state", Words, nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    Column("percent", Integer),
    Column("reason", Words),
    Column("finished_at", Double),
    Column("metrics", JsonText, nullable=False),
    Column("owner", Words),
)

evaluations = Table(
    "evaluations",
    metadata,
    _seq(),
    Column("id", Words, nullable=False, unique=True),
    Column("version", Words, ForeignKey("versions.id"), nullable=False, index=True),
    Column("set_name", Words, nullable=False, index=True),
    Column("set_hash", Words, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("sampling", JsonText, nullable=False),
    Column("scores", JsonText, nullable=False),
    Column("counts", JsonText, nullable=False),
    Column("run", JsonText, nullable=False),
)

evaluation_answers = Table(
    "evaluation_answers",
    metadata,
    Column("evaluation_id", Words, ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("question_id", Words, nullable=False),
    Column("category", Words, nullable=False),
    Column("question", Words, nullable=False),
    Column("pictures", JsonText, nullable=False),
    Column("expected", JsonText, nullable=False),
    Column("metric", Words, nullable=False),
    Column("answer", Words, nullable=False),
    Column("score", Double, nullable=False),
    Column("finish_reason", Words),
    Column("error", Words),
)

# `live` and `previous` name versions; `jobs`, `rollouts` and `keys` are rows that writers lock first.
markers = Table(
    "markers",
    metadata,
    Column("key", Words, primary_key=True),
    Column("value", Words),
)

processes = Table(
    "processes",
    metadata,
    Column("id", Words, primary_key=True),
    Column("kind", Words, nullable=False, index=True),
    Column("heartbeat_at", Double, nullable=False),
    Column("info", JsonText, nullable=False),
)
