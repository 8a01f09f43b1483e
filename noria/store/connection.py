"""How the store reaches its database: engine, transactions, locks, migrations. The only file with SQL of one database.

Comes in: a SQLAlchemy URL (SQLite file or PostgreSQL). Goes out: `Database`, with `read()` and `write()` transactions.
Must not import torch, vllm or fastapi. Alembic is imported only when the schema is behind.

SQLite: WAL, so that readers never wait for the writer; synchronous=FULL, so that a commit is on the disk when it
returns; every write begins with BEGIN IMMEDIATE, because a read transaction that is upgraded later can fail
without waiting. One lock per process queues the writers of its threads; between processes SQLite's busy timeout does.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, inspect, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DataError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from noria.errors import Conflict, InvalidRequest, SettingsError, Unavailable
from noria.store.tables import markers

HEAD = "0005"
BUSY_MS = 30_000
NOT_HELD = (DataError, OverflowError, UnicodeEncodeError)  # 64-bit integers, text without NUL (PostgreSQL), UTF-8
MIGRATIONS = Path(__file__).parent / "migrations"
ADVISORY_LOCK = 0x6E6F726961  # "noria": PostgreSQL's lock around a migration
_WRITE = {"noria_write": True}
_alembic_lock = threading.Lock()  # Alembic keeps its context in module globals


class Database:
    """An engine and the two kinds of transaction that the store uses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()

    @classmethod
    def open(cls, url: str) -> Database:
        """Connects and brings the schema up to date. Raises SettingsError for a URL that cannot work."""
        parsed = _parse(url)
        database = cls(_engine(parsed))
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of the store. Raises Unavailable when the database does not answer."""
        with _translated(), self.engine.connect() as conn:
            yield conn

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: committed and durable on a normal exit, rolled back on an exception."""
        with _translated(), self._writer, self.engine.connect() as conn:
            conn = conn.execution_options(**_WRITE)
            with conn.begin():
                yield conn

    def empty_log(self) -> None:
        """Has SQLite move its write-ahead log into the file and cut it: pages as they were before a deletion lie there.

        A reader that holds an older view keeps the log; then the next commits overwrite it. PostgreSQL keeps its own.
        """
        if not self.is_sqlite:
            return
        with _translated(), closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout=1000")
            try:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
                cursor.close()

    def lock(self, conn: Connection, name: str) -> None:
        """Queues this transaction behind every other that holds marker `name`. A SQLite write is alone anyway."""
        if not self.is_sqlite:
            conn.execute(select(markers.c.key).where(markers.c.key == name).with_for_update())

    def insert_new(self, table: Table) -> Any:
        """An INSERT that leaves rows alone whose key exists already."""
        return self._insert(table).on_conflict_do_nothing()

    def upsert(self, table: Table, key: str, changing: tuple[str, ...]) -> Any:
        """An INSERT that overwrites the columns `changing` of a row whose `key` exists already."""
        statement = self._insert(table)
        new = {name: statement.excluded[name] for name in changing}
        return statement.on_conflict_do_update(index_elements=[key], set_=new)

    def adding(self, table: Table, key: tuple[str, ...], column: str) -> Any:
        """An INSERT that adds to `column` of a row whose `key` exists already."""
        statement = self._insert(table)
        return statement.on_conflict_do_update(
            index_elements=key, set_={column: table.c[column] + statement.excluded[column]}
        )

    def _insert(self, table: Table) -> Any:
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def _migrate(self) -> None:
        with self.read() as conn:
            if _revision(conn) == HEAD:
                return
        with _alembic_lock, self.write() as conn:
            if not self.is_sqlite:
                conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
            if _revision(conn) != HEAD:
                _upgrade(conn)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except ArgumentError as error:
        raise SettingsError(f"store.url is not a database URL: {error}", param="store.url") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    elif backend not in ("sqlite", "postgresql"):
        raise SettingsError(f"store.url names {backend!r}; Noria knows sqlite and postgresql", param="store.url")
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise SettingsError("store.url must name a SQLite file: sqlite:////path/to/noria.db", param="store.url")
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    return parsed


def _engine(url: URL) -> Engine:
    # Threads take a connection each for the length of one transaction; the pool must outlast a server's thread pool.
    # Parameters are prompts and users, and errors are logged.
    pool: dict[str, Any] = {"pool_size": 8, "max_overflow": 56, "pool_timeout": 30, "hide_parameters": True}
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_engine(url, connect_args={"timeout": BUSY_MS / 1000}, **pool)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return create_engine(url, pool_pre_ping=True, **pool)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = f"store.url needs a driver that is not installed ({error}): pip install 'noria[postgres]'"
        raise SettingsError(message, param="store.url") from error


def _prepare_sqlite(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA secure_delete=ON")  # what a user asked us to forget must not stay in free pages


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Switches the file to WAL once. The switch itself ignores the busy timeout, so it is tried again here."""
    for attempt in range(100):
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                return
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if attempt == 99:
                raise
            time.sleep(0.05)


def _begin_sqlite(conn: Connection) -> None:
    writes = conn.get_execution_options().get("noria_write")
    conn.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        raise Unavailable(f"the store does not answer: {cause}", code="store_unavailable") from error
    except NOT_HELD as error:
        what = "a number is too large" if isinstance(error, OverflowError) else "a text is no UTF-8, or has NUL in it"
        raise InvalidRequest(f"the store cannot hold what it was given: {what}") from error


def _revision(conn: Connection) -> str | None:
    if not inspect(conn).has_table("alembic_version"):
        return None
    return conn.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(conn: Connection) -> None:
    """Runs Alembic inside this very transaction: a migration that fails leaves nothing behind."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = conn
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        message = f"the store was written by another Noria than this one ({error}): use a version that knows it"
        raise Conflict(message, param="store.url") from error
