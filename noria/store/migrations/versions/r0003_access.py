"""API keys, whose completions are whose, and what operators did.

Frozen history: it spells its columns out and must not import `noria.store`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Builds both tables, the marker that writers of keys lock, and the completions' column."""
    op.create_table(
        "api_keys",
        _seq(),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("name", "roles", "hash")),
        sa.Column("created_at", sa.Double, nullable=False),
        *(sa.Column(name, sa.Double) for name in ("last_used_at", "expires_at", "revoked_at")),
        sa.Column("previous_hash", sa.Text),
        sa.Column("previous_until", sa.Double),
    )
    op.create_table(
        "audit_events",
        _seq(),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False, index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False, index=True),
        sa.Column("target", sa.Text),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("wire", sa.Text, nullable=False),
    )
    markers = sa.table("markers", sa.column("key"), sa.column("value"))
    op.bulk_insert(markers, [{"key": "keys", "value": None}])
    op.add_column("completions", sa.Column("key_id", sa.Text))
    op.create_index("ix_completions_key_id", "completions", ["key_id"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index("ix_completions_key_id", "completions")
    op.drop_column("completions", "key_id")
    op.execute("DELETE FROM markers WHERE key = 'keys'")
    op.drop_table("audit_events")
    op.drop_table("api_keys")


def _seq() -> sa.Column[int]:
    return sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True)
