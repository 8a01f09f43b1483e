"""What no single noun shows: durability, migrations, several processes, refusals of URLs, a light import."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from noria.errors import Conflict, NoriaError, SettingsError, Unavailable
from noria.records import Side
from noria.store import Store
from noria.store.connection import HEAD, MIGRATIONS, Database
from noria.store.tables import metadata
from tests.unit.store.samples import completion

# Acknowledges each preference on stdout only after add_preference has returned.
WRITER = """
import sys
from noria.records import Side
from noria.store import Store
store = Store.open(sys.argv[1])
number = 0
while True:
    made, created = store.add_preference(Side("c1", 0), Side("c1", 1), annotator=f"{sys.argv[2]}-{number}")
    assert created
    print(made.id, flush=True)
    number += 1
"""

OPENER = """
import sys
from noria.store import Store
sys.stdin.readline()
with Store.open(sys.argv[1]) as store:
    print(store.preference_counts()["total"])
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs `script`."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_kill_9_loses_no_acknowledged_preference(store_url: str) -> None:
    with Store.open(store_url) as store:
        store.add_completions([completion("c1")])
    writers = [start(WRITER, store_url, name) for name in ("a", "b")]
    acknowledged: list[str] = []
    for writer in writers:
        assert writer.stdout is not None
        acknowledged += [writer.stdout.readline().strip() for _ in range(40)]
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        assert writer.stdout is not None
        rest = writer.stdout.read()  # not communicate(), which forgets what readline() has read ahead
        acknowledged += rest.split("\n")[:-1]  # what follows the last line end was never whole
        assert writer.wait(30) == -signal.SIGKILL
    with Store.open(store_url) as store:
        kept = {one.id for one in store.iter_preferences()}
        assert store.preference_counts()["total"] == len(kept)
        # The same pair and annotator again: nothing was written twice.
        assert len({one.annotator for one in store.iter_preferences()}) == len(kept)
    assert len(acknowledged) >= 80
    assert set(acknowledged) <= kept
    # Beyond what was acknowledged, only the one write of each process that was under way can be there.
    assert len(kept) - len(set(acknowledged)) <= len(writers)


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    broken = completion("c2", metadata={"key": "value"})
    object.__setattr__(broken, "choices", (*broken.choices, broken.choices[0]))
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.add_completions([completion("c1"), broken])
    assert store.count_completions() == 0
    assert store.add_completions([completion("c1")]) == 1


def test_processes_that_open_an_empty_store_at_once_all_succeed(store_url: str) -> None:
    openers = [start(OPENER, store_url) for _ in range(4)]
    answers = [opener.communicate("go\n", timeout=60) for opener in openers]
    assert [opener.returncode for opener in openers] == [0, 0, 0, 0]
    assert [out.strip() for out, _ in answers] == ["0", "0", "0", "0"]


def test_threads_write_and_read_at_once(store: Store) -> None:
    store.add_completions([completion("c1")])

    def work(number: int) -> int:
        store.add_completions([completion(f"n{number}", created_at=200.0 + number)])
        store.add_preference(Side("c1", 0), Side("c1", 1), annotator=str(number % 20))
        return len(store.list_preferences(limit=100))

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(work, range(80)))
    assert store.count_completions() == 81
    assert store.preference_counts()["total"] == 20  # four threads each said the same, once it counts
    assert max(seen) == 20


def test_the_migrations_build_exactly_the_tables(store_url: str) -> None:
    database = Database.open(store_url)
    with database.read() as conn:
        context = MigrationContext.configure(conn, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD
    database.close()
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [HEAD]


def test_opening_again_changes_nothing_and_keeps_everything(store_url: str) -> None:
    for expected in (0, 1):
        with Store.open(store_url) as store:
            assert store.count_completions() == expected
            store.add_completions([completion("c1")])


def test_a_store_of_a_newer_noria_is_refused_untouched(store_url: str) -> None:
    database = Database.open(store_url)
    with database.write() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(Conflict, match="another Noria"):
        Store.open(store_url)


def test_sqlite_is_durable_and_readers_do_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "noria.db"
    database = Database.open(f"sqlite:///{path}")
    with database.read() as conn:
        asked = {name: conn.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")}
        asked["foreign_keys"] = conn.execute(text("PRAGMA foreign_keys")).scalar()
    assert asked == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    with Store.open(f"sqlite:///{path}") as store, database.write() as conn:
        conn.execute(text("DELETE FROM completions"))  # an open write transaction of another connection
        assert store.count_completions() == 0
    database.close()


def test_a_store_that_stays_locked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noria.store.connection.BUSY_MS", 50)
    path = tmp_path / "noria.db"
    with Store.open(f"sqlite:///{path}") as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked") as told:
            store.add_completions([completion("c1")])
        assert told.value.code == "store_unavailable"
        other.execute("ROLLBACK")
        other.close()
        assert store.add_completions([completion("c1")]) == 1


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("not a url", SettingsError),
        ("sqlite://", SettingsError),
        ("sqlite:///:memory:", SettingsError),
        ("mysql://host/db", SettingsError),
        ("postgresql://nobody@127.0.0.1:1/none", Unavailable),
    ],
)
def test_urls_that_cannot_work_say_so(url: str, error: type[NoriaError]) -> None:
    with pytest.raises(error):
        Store.open(url)


def test_importing_the_store_stays_light() -> None:
    listed = "import json, sys, noria; early = sorted(sys.modules); import noria.store, noria.registry, noria.blobs; "
    listed += "print(json.dumps([early, sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    early, late = (set(names) for names in json.loads(done.stdout))
    assert "sqlalchemy" not in early
    heavy = {"torch", "vllm", "fastapi", "transformers", "alembic", "PIL", "numpy", "serve", "train"}
    assert heavy & late == set()
