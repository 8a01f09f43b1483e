"""Evaluations of versions on sets of questions, and each question's answer.

Frozen history: it spells its columns out and must not import `noria.store.tables`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Builds both tables."""
    op.create_table(
        "evaluations",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("version", sa.Text, sa.ForeignKey("versions.id"), nullable=False, index=True),
        sa.Column("set_name", sa.Text, nullable=False, index=True),
        sa.Column("set_hash", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("sampling", "scores", "counts", "run")),
    )
    texts = ("question_id", "category", "question", "pictures", "expected", "metric", "answer")
    op.create_table(
        "evaluation_answers",
        sa.Column("evaluation_id", sa.Text, sa.ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in texts),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("finish_reason", sa.Text),
        sa.Column("error", sa.Text),
    )


def downgrade() -> None:
    """Drops both."""
    op.drop_table("evaluation_answers")
    op.drop_table("evaluations")
