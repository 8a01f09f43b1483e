"""Children are kept up, ended together, and never left behind: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from noria.cli.up import supervisor
from noria.cli.up.supervisor import Child, Stop, Supervisor, run_once

STUBBORN = """
    import pathlib, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(60)")
    left_behind = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    left_behind.stdout.readline()
    pathlib.Path(sys.argv[1]).write_text(str(left_behind.pid))
    time.sleep(60)
"""


def child(code: str, *arguments: object) -> Child:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return Child("child", command, dict(os.environ))


def eventually(true: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stop_ends_even_what_ignores_it_and_what_it_left_behind(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    stubborn, stop = child(STUBBORN, noted), Stop()
    told: list[str] = []

    def stop_when_noted() -> None:
        if noted.exists() and noted.read_text():
            stop.asked = 1

    status = Supervisor([stubborn], stop, stop_s=0.3, tell=told.append, watch=stop_when_noted).run()
    assert (status, told) == (0, [])
    assert stubborn.process is not None
    assert stubborn.process.returncode == -signal.SIGKILL
    eventually(lambda: not lives(int(noted.read_text())))


def test_a_polite_child_ends_by_itself(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    polite = child(
        """
        import pathlib, signal, sys, time
        def end(*_):
            pathlib.Path(sys.argv[1]).write_text("clean")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        pathlib.Path(sys.argv[1]).write_text("up")
        time.sleep(60)
        """,
        mark,
    )
    stop = Stop()

    def stop_when_up() -> None:
        if mark.exists() and mark.read_text():
            stop.asked = 1

    assert Supervisor([polite], stop, stop_s=20, tell=print, watch=stop_when_up).run() == 0
    assert mark.read_text() == "clean"


def test_a_crashed_child_starts_again_after_growing_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    runs = tmp_path / "runs"
    crashing = child("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(1)", runs)
    told: list[str] = []
    status = Supervisor([crashing], Stop(), stop_s=1, tell=told.append, attempts_until_steady=4).run()
    assert status == 1
    assert runs.read_text() == "xxxx"
    assert [line.rpartition(" in ")[2] for line in told[:3]] == ["0.01 s", "0.02 s", "0.04 s"]
    assert "given up" in told[3]


def test_a_child_that_refuses_its_settings_is_not_tried_again(tmp_path: Path) -> None:
    other = child("import time; time.sleep(60)")
    wrong = child("import sys; sys.exit(2)")
    told: list[str] = []
    assert Supervisor([other, wrong], Stop(), stop_s=5, tell=told.append).run() == 2
    assert len(told) == 1
    assert other.process is not None
    assert other.process.returncode == -signal.SIGTERM


def test_run_once_gives_the_status_or_ends_when_asked() -> None:
    assert run_once(child("raise SystemExit(6)"), Stop(), stop_s=1) == 6
    stop = Stop()
    threading.Timer(0.2, lambda: setattr(stop, "asked", 1)).start()
    sleeper = child("import time; time.sleep(60)")
    assert run_once(sleeper, stop, stop_s=5) == -signal.SIGTERM
    assert sleeper.process is not None
    assert sleeper.process.returncode == -signal.SIGTERM


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import os, sys
                from noria.cli.up.supervisor import Child, Stop, Supervisor
                code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
                one = Child("child", [sys.executable, "-c", code, sys.argv[1]], dict(os.environ))
                Supervisor([one], Stop(), stop_s=1, tell=print).run()
                """
            ),
            str(noted),
        ]
    )
    eventually(lambda: noted.exists() and bool(noted.read_text()))
    parent.kill()
    parent.wait()
    eventually(lambda: not lives(int(noted.read_text())))
