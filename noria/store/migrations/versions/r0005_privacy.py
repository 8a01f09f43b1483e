"""What jobs used, what was forgotten of it, and the markers that pictures and hashes need.

Frozen history: it spells its columns out and must not import `noria.store.tables`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Builds the tables and adds the markers."""
    op.create_table(
        "job_uses",
        sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("part", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True, index=True),
    )
    op.create_table(
        "forgotten",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("user_hash", sa.Text, nullable=False, index=True),
        sa.Column("forgotten_at", sa.Double, nullable=False),
        sa.Column("counts", sa.Text, nullable=False),
    )
    op.create_table(
        "forgotten_uses",
        sa.Column("forgotten_id", sa.Text, sa.ForeignKey("forgotten.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("job_id", sa.Text, primary_key=True, index=True),
        sa.Column("part", sa.Text, primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
    )
    markers = sa.table("markers", sa.column("key", sa.Text))
    op.bulk_insert(markers, [{"key": "pictures"}, {"key": "forget_key"}])


def downgrade() -> None:
    """Drops all of it."""
    for name in ("forgotten_uses", "forgotten", "job_uses"):
        op.drop_table(name)
    op.execute("DELETE FROM markers WHERE key IN ('pictures', 'forget_key')")
