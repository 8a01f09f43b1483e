"""The first tables: completions, what people say of them, jobs, versions, rollouts, processes.

Frozen history: it spells its columns out and must not import `noria.store.tables`, which moves on.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Builds every table, and the markers that writers lock."""
    _completions()
    _judgements()
    _snapshots()
    _jobs()
    _releases()


def downgrade() -> None:
    """Drops everything."""
    names = "processes markers rollouts versions job_events jobs snapshot_jobs snapshot_items snapshots"
    names += " feedback preferences completion_images images choices completion_metadata completions"
    for name in names.split():
        op.drop_table(name)


def _seq() -> sa.Column[Any]:
    return sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True)


def _text(name: str, **kwargs: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=kwargs.pop("nullable", False), **kwargs)


def _refers(name: str, to: str, ondelete: str | None = "CASCADE", **kwargs: Any) -> sa.Column[Any]:
    nullable = kwargs.pop("nullable", False)
    return sa.Column(name, sa.Text, sa.ForeignKey(to, ondelete=ondelete), nullable=nullable, **kwargs)


def _integer(name: str, **kwargs: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, nullable=kwargs.pop("nullable", False), **kwargs)


def _double(name: str, **kwargs: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, nullable=kwargs.pop("nullable", False))


def _completions() -> None:
    op.create_table(
        "completions",
        _text("id", primary_key=True),
        _double("created_at"),
        _text("model"),
        _text("model_version"),
        _text("messages"),
        _text("params"),
        _text("prompt_hash", index=True),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        _text("end_user", nullable=True, index=True),
        _text("metadata"),
        _text("usage"),
        _text("system_fingerprint", nullable=True),
        _double("ttft_s", nullable=True),
        _double("duration_s", nullable=True),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Index("ix_completions_created_at_id", "created_at", "id"),
    )
    op.create_table(
        "completion_metadata",
        _refers("completion_id", "completions.id", primary_key=True),
        _text("key", primary_key=True),
        _text("value"),
        sa.Index("ix_completion_metadata_key_value", "key", "value"),
    )
    op.create_table(
        "choices",
        _refers("completion_id", "completions.id", primary_key=True),
        _integer("index", primary_key=True, autoincrement=False),
        _text("text"),
        _text("message"),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("logprobs", sa.LargeBinary, nullable=False),
        _text("finish_reason", nullable=True),
    )
    op.create_table(
        "images",
        _text("sha256", primary_key=True),
        _text("media_type"),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        _integer("width", nullable=True),
        _integer("height", nullable=True),
    )
    op.create_table(
        "completion_images",
        _refers("completion_id", "completions.id", primary_key=True),
        _integer("position", primary_key=True, autoincrement=False),
        _refers("sha256", "images.sha256", None, index=True),
    )


def _judgements() -> None:
    op.create_table(
        "preferences",
        _seq(),
        _text("id", unique=True),
        _double("created_at"),
        _text("prompt_hash", index=True),
        _refers("chosen_completion_id", "completions.id", nullable=True, index=True),
        _integer("chosen_index", nullable=True),
        _text("chosen_text", nullable=True),
        _refers("rejected_completion_id", "completions.id", nullable=True, index=True),
        _integer("rejected_index", nullable=True),
        _text("rejected_text", nullable=True),
        _text("verdict"),
        _text("annotator", nullable=True, index=True),
        _text("comment", nullable=True),
        _text("source"),
        _text("pair_key", index=True),
    )
    op.create_table(
        "feedback",
        _seq(),
        _text("id", unique=True),
        _double("created_at"),
        _refers("completion_id", "completions.id", index=True),
        _integer("index"),
        _integer("rating", nullable=True),
        _text("thumb", nullable=True),
        _text("edit", nullable=True),
        _text("comment", nullable=True),
        _text("annotator", nullable=True, index=True),
        _refers("preference_id", "preferences.id", "SET NULL", nullable=True, index=True),
    )


def _snapshots() -> None:
    op.create_table(
        "snapshots",
        _text("id", primary_key=True),
        _double("created_at"),
        _text("job_id"),
        _text("counts"),
    )
    op.create_table(
        "snapshot_items",
        _refers("snapshot_id", "snapshots.id", primary_key=True),
        _text("part", primary_key=True),
        _integer("position", primary_key=True, autoincrement=False),
        _text("preference_id", index=True),
    )
    op.create_table(
        "snapshot_jobs",
        _refers("snapshot_id", "snapshots.id", primary_key=True),
        _text("job_id", primary_key=True, index=True),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        _seq(),
        _text("id", unique=True),
        _text("method"),
        _text("state", index=True),
        _text("stage"),
        _double("progress"),
        _double("created_at"),
        _text("settings"),
        _text("rollout"),
        _text("metrics"),
        _text("version", nullable=True),
        _text("error", nullable=True),
        _text("done"),
        _integer("attempt"),
        _text("owner", nullable=True),
        _double("lease_until", nullable=True),
        _double("heartbeat_at", nullable=True),
        _double("started_at", nullable=True),
        _double("finished_at", nullable=True),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        _text("reason"),
        _integer("event_seq"),
    )
    running = sa.text("state = 'running'")
    op.create_index(
        "uq_jobs_one_running", "jobs", ["state"], unique=True, sqlite_where=running, postgresql_where=running
    )
    op.create_table(
        "job_events",
        _refers("job_id", "jobs.id", primary_key=True),
        _integer("seq", primary_key=True, autoincrement=False),
        _double("at"),
        _text("kind"),
        _text("data"),
    )


def _releases() -> None:
    op.create_table(
        "versions",
        _seq(),
        _text("id", unique=True),
        _text("parent", nullable=True),
        _text("state"),
        _text("method"),
        _text("job", nullable=True, index=True),
        _double("created_at"),
        _text("metrics"),
        _text("frozen"),
        _text("manifest_sha256", nullable=True),
    )
    op.create_table(
        "rollouts",
        _seq(),
        _text("id", unique=True),
        _refers("version", "versions.id", None),
        _text("previous", nullable=True),
        _text("strategy"),
        _text("state", index=True),
        _double("created_at"),
        _integer("percent", nullable=True),
        _text("reason", nullable=True),
        _double("finished_at", nullable=True),
        _text("metrics"),
        _text("owner", nullable=True),
    )
    markers = op.create_table("markers", _text("key", primary_key=True), _text("value", nullable=True))
    op.bulk_insert(markers, [{"key": key} for key in ("live", "previous", "jobs", "rollouts")])
    op.create_table(
        "processes",
        _text("id", primary_key=True),
        _text("kind", index=True),
        _double("heartbeat_at"),
        _text("info"),
    )
