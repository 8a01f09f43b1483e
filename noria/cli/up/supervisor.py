"""Child processes that never outlive their parent: started, watched, restarted with growing pauses, ended.

Comes in: commands. Goes out: running processes, each the leader of its own process group.
On Linux a child is told to end when its parent dies, whatever way that happens. Must not import serve or train.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from noria.errors import WIRE

PR_SET_PDEATHSIG = 1  # prctl(2)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 60.0  # a child that ran for so long starts again without a pause
TICK_S = 0.1
HOPELESS = frozenset(wire.exit_code for wire in WIRE.values()) - {1, 7}  # wrong settings and the like: no retry helps


@dataclass
class Child:
    """One command, its process, and how often it has failed in a row. `output` is a file for what it prints."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    began: float = 0.0
    due: float = 0.0
    output: int | None = None

    def start(self) -> None:
        """Starts the command in its own session; what it prints goes to `output`, else to our standard error."""
        self.began = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own modules
            self.command,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if self.output is None else self.output,
            stderr=self.output,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone: it tells its own children."""
        if self.process is not None and self.running:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def sweep(self) -> None:
        """Kills what is left of the process's group; what it left behind would keep memory and ports."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Stop:
    """Whether somebody asked us to stop, and how often: a second asking means at once."""

    def __init__(self) -> None:
        self.asked = 0

    def listen(self) -> None:
        """Takes SIGTERM, SIGINT and SIGHUP from here on."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.asked += 1


class Supervisor:
    """Keeps its children running until it is asked to stop; then ends them in order and leaves nothing behind."""

    def __init__(
        self,
        children: Sequence[Child],
        stop: Stop,
        *,
        stop_s: float,
        tell: Callable[[str], None],
        watch: Callable[[], None] = lambda: None,
        attempts_until_steady: int = 5,
    ) -> None:
        self._children = children
        self._stop = stop
        self._stop_s = stop_s
        self._tell = tell
        self._watch = watch
        self._attempts = attempts_until_steady

    def run(self) -> int:
        """Returns 0 after a stop that was asked for, else the exit status of the child that could not be kept up."""
        try:
            for child in self._children:
                child.start()
            while not self._stop.asked:
                self._watch()
                for child in self._children:
                    status = self._look_after(child)
                    if status is not None:
                        return status
                time.sleep(TICK_S)
            return 0
        finally:
            end(self._children, self._stop, self._stop_s)

    def _look_after(self, child: Child) -> int | None:
        """Restarts a dead child when its pause is over; an exit status when it is given up."""
        if child.process is None:
            if time.monotonic() >= child.due:
                child.start()
            return None
        status = child.process.poll()
        if status is None:
            return None
        child.sweep()
        child.process = None
        steady = time.monotonic() - child.began >= STEADY_S
        child.failures = 1 if steady else child.failures + 1
        if not steady and (status in HOPELESS or child.failures >= self._attempts):
            self._tell(f"the {child.name} ended with status {status} and is given up; its last lines are above")
            return status if status > 0 else 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (child.failures - 1), LONGEST_PAUSE_S)
        child.due = time.monotonic() + pause_s
        self._tell(f"the {child.name} ended with status {status}; it starts again in {pause_s:g} s")
        return None


def run_once(child: Child, stop: Stop, *, stop_s: float) -> int:
    """Runs one command to its end and returns its status; -15 when we were asked to stop meanwhile."""
    child.start()
    try:
        while child.process is not None and not stop.asked:
            status = child.process.poll()
            if status is not None:
                return status
            time.sleep(TICK_S)
        return -signal.SIGTERM
    finally:
        end([child], stop, stop_s)


def end(children: Sequence[Child], stop: Stop, stop_s: float) -> None:
    """SIGTERM to all, a wait of `stop_s` seconds (none after a second asking), then SIGKILL to what is left."""
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + stop_s
    while any(child.running for child in children) and time.monotonic() < deadline and stop.asked < 2:
        time.sleep(TICK_S)
    for child in children:
        child.sweep()
        if child.process is not None:
            child.process.wait()


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs between fork and exec, so that the kernel ends it when we die. None where there is no such."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: after the fork nothing may be loaded
    parent = os.getpid()

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # we died between the fork and the line above
            os._exit(1)

    return before_exec
