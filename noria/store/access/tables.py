"""The tables of keys and of the audit log.

Comes in: the store's metadata. Goes out: `api_keys`, `audit_events`. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Integer, Table

from noria.store.tables import JsonText, Words, metadata

api_keys = Table(
    "api_keys",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Words, nullable=False, unique=True),
    Column("name", Words, nullable=False),
    Column("roles", JsonText, nullable=False),
    Column("hash", Words, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("previous_hash", Words),
    Column("previous_until", Double),
)

# Rows are added and read, and nothing of Noria's changes or deletes one.
audit_events = Table(
    "audit_events",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Words, nullable=False, unique=True),
    Column("at", Double, nullable=False),
    Column("key_id", Words, nullable=False, index=True),
    Column("name", Words, nullable=False),
    Column("action", Words, nullable=False, index=True),
    Column("target", Words),
    Column("result", Words, nullable=False),
    Column("wire", Words, nullable=False),
)
