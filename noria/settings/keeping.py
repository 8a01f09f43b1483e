"""What is kept of the traffic, and where.

Comes in: a tree. Goes out: frozen sections.
"""

from __future__ import annotations

from pydantic import Field

from noria.module_settings import Section


class CaptureSettings(Section):
    """What is kept of the traffic."""

    default: bool = True
    """Keep completions whose request does not say `store`. `store: false` is always obeyed."""
    queue_size: int = Field(2048, ge=1)
    """Completions that may wait for the store; past it the newest are dropped and counted."""
    commit_ms: int = Field(20, ge=0)
    """How long a write waits for others to share its commit, in milliseconds."""
    batch: int = Field(128, ge=1)
    """Most completions in one commit."""


class StoreSettings(Section):
    """Where records and pictures lie."""

    url: str | None = None
    """SQLAlchemy URL; none is SQLite at NORIA_HOME/noria.db. `postgresql+psycopg://...` works too."""
    blobs: str | None = None
    """fsspec URL of the pictures; none is NORIA_HOME/blobs."""
