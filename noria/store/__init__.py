"""The store: everything that serve and train know of each other, in one database.

Comes in: records (`noria.records`). Goes out: the same records. Synchronous and safe from any number of threads and
processes; asynchronous callers use `asyncio.to_thread`.
Must not import torch, vllm, fastapi, serve or train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from noria.store.access import AuditStore, KeyStore
from noria.store.completions import CompletionStore
from noria.store.connection import Database
from noria.store.evaluations import EvaluationStore
from noria.store.feedback import FeedbackStore
from noria.store.jobs import JobStore
from noria.store.limits import LimitStore
from noria.store.pairs import PairStore
from noria.store.preferences import PreferenceStore
from noria.store.privacy import LineageStore, PictureStore, RetentionStore
from noria.store.releases import ProcessStore, RolloutStore, VersionStore

__all__ = ["Store"]


class Store(
    CompletionStore,
    PreferenceStore,
    FeedbackStore,
    PairStore,
    JobStore,
    VersionStore,
    RolloutStore,
    ProcessStore,
    EvaluationStore,
    KeyStore,
    AuditStore,
    LimitStore,
    LineageStore,
    PictureStore,
    RetentionStore,
):
    """One open store. Each method is one transaction, durable when it returns.

    Any method raises Unavailable when the database does not answer; what it was to write is then not written.
    """

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] = time.time) -> Self:
        """Connects to a SQLAlchemy URL (a SQLite file or PostgreSQL), and creates or migrates the schema.

        Raises SettingsError for a URL that cannot work, Unavailable when the database does not answer.
        """
        return cls(Database.open(url), clock)

    def close(self) -> None:
        """Closes the connections."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
