"""Tables of what is forgotten: which judgements and conversations jobs used, and what was known of them when they went.

Comes in: nothing. Goes out: three tables in the store's `metadata`. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Table

from noria.store.tables import JsonText, Words, metadata

# What a job used beside its snapshot's judgements: conversations by their ids, and what its rewards learnt from.
# No foreign key to what `ref` names: the row says what was used after that is deleted.
job_uses = Table(
    "job_uses",
    metadata,
    Column("job_id", Words, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("part", Words, primary_key=True),
    Column("ref", Words, primary_key=True, index=True),
)

# One row for each time that an end user was forgotten. The name is not in it, only its keyed hash.
forgotten = Table(
    "forgotten",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Words, nullable=False, unique=True),
    Column("user_hash", Words, nullable=False, index=True),
    Column("forgotten_at", Double, nullable=False),
    Column("counts", JsonText, nullable=False),
)

# In which jobs what was forgotten had been used, by part, and how many of it.
forgotten_uses = Table(
    "forgotten_uses",
    metadata,
    Column("forgotten_id", Words, ForeignKey("forgotten.id", ondelete="CASCADE"), primary_key=True),
    Column("job_id", Words, primary_key=True, index=True),
    Column("part", Words, primary_key=True),
    Column("count", Integer, nullable=False),
)
