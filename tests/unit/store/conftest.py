"""Fixtures of the store's suite: a clock that stands still, and a store on each database that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from noria.store import Store
from noria.store.connection import Database
from noria.store.tables import markers, metadata
from tests.postgres import Cluster, programs

BACKENDS = ("sqlite", "postgresql") if programs() else ("sqlite",)


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The store's clock."""
    return Clock()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server, started when the first test asks for it."""
    folder = programs()
    assert folder is not None
    running = Cluster(folder)
    yield running
    running.close()


@pytest.fixture(params=BACKENDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'noria.db'}"
    running: Cluster = request.getfixturevalue("cluster")
    return running.database()


@pytest.fixture(scope="session")
def migrated_url(cluster: Cluster) -> str:
    """A PostgreSQL schema that tests share one after the other: building the tables costs more than most tests."""
    return cluster.database()


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """An open, empty store on the test's clock."""
    on_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'noria.db'}" if on_sqlite else request.getfixturevalue("migrated_url")
    with Store.open(url, clock=clock) as opened:
        yield opened
    if not on_sqlite:
        _empty(url)


def _empty(url: str) -> None:
    database = Database.open(url)
    with database.write() as conn:
        for table in reversed(metadata.sorted_tables):
            conn.execute(update(table).values(value=None) if table is markers else delete(table))
    database.close()
