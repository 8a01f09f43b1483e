"""What keys have used: tokens a day, judgements of the last hour.

Frozen history: it spells its columns out and must not import the tables, which move on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Builds both tables, and the marker that writers of judgements lock."""
    op.create_table(
        "key_tokens",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "key_judgements",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_key_judgements_key_id_at", "key_judgements", ["key_id", "at"])
    markers = sa.table("markers", sa.column("key", sa.Text))
    op.bulk_insert(markers, [{"key": "judgements"}])


def downgrade() -> None:
    """Drops both."""
    op.execute("DELETE FROM markers WHERE key = 'judgements'")
    op.drop_table("key_judgements")
    op.drop_table("key_tokens")
