"""A PostgreSQL cluster of the tests' own, in a temporary folder, where the server's programs are installed.

Goes out: `programs()` (None where there are none) and `Cluster`, which gives fresh schemas. Nothing listens on TCP.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """Folder of `initdb` and `postgres`; None where they, or the driver, are missing."""
    if importlib.util.find_spec("psycopg") is None:
        return None
    folders = [Path(found).resolve().parent for found in (shutil.which("postgres"),) if found]
    if config := shutil.which("pg_config"):
        asked = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        folders.append(Path(asked.stdout.strip() or os.devnull))
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    return None


class Cluster:
    """A running server; the server refuses root, so that root starts it as another user."""

    def __init__(self, bin_dir: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="noria-pg-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _unprivileged()
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._numbers = itertools.count(1)
        data = str(self._folder / "data")
        self._run([str(bin_dir / "initdb"), "-D", data, "-U", "noria", "-A", "trust", "-E", "UTF8", "--no-sync"])
        options = ["listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off", "shared_buffers=16MB"]
        flags = [part for option in options for part in ("-c", option)]
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen(
                [str(bin_dir / "postgres"), "-D", data, *flags], cwd=self._folder, stdout=log, stderr=log, **self._as
            )
        self._wait()

    def database(self) -> str:
        """The URL of a new, empty schema; to make one costs a thousandth of a new database."""
        name = f"test_{next(self._numbers)}"
        self._execute(f"CREATE SCHEMA {name}")
        return f"postgresql+psycopg://noria@/postgres?host={self._folder}&options=-csearch_path%3D{name}"

    def close(self) -> None:
        """Stops the server and removes its folder."""
        self._server.send_signal(signal.SIGQUIT)  # "immediate": nobody needs these files again
        self._server.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, **self._as)
        assert done.returncode == 0, done.stderr

    def _execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(f"host={self._folder} user=noria dbname=postgres", autocommit=True) as conn:
            conn.execute(statement)  # type: ignore[arg-type,unused-ignore]

    def _wait(self) -> None:
        import psycopg

        for _ in range(300):
            try:
                return self._execute("SELECT 1")
            except psycopg.OperationalError:
                assert self._server.poll() is None, (self._folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((self._folder / "log").read_text())


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
