"""A process that calls one function with a time limit, killed and started again when it hangs or dies.

Comes in: a function's name and limits. Goes out: a value or a failure for each sample. Must not import torch or
`serve`.

The child bounds each call itself (SIGALRM); should the function have taken that from it, this side waits no longer than
the limit and a grace, and kills it with all its own children.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from noria.errors import SettingsError
from noria.records import Json
from train.rewards.protocol import UNJUDGED, Failure, Sample, Value

GRACE_S = 1.0
_TIMEOUT = Failure("timeout")
_ROOT = Path(__file__).parents[3]  # where `train` and `noria` are imported from


class FunctionProcess:
    """One child. `arguments` are handed to the function by keyword, beside the sample; JSON only.

    Raises SettingsError where the function cannot be imported at the first start; later starts that fail cost samples.
    For one thread at a time.
    """

    def __init__(
        self,
        function: str,
        *,
        timeout_s: float,
        start_timeout_s: float,
        path: Path | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._asked = {"function": function, "path": str(path) if path else None, "arguments": dict(arguments or {})}
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        failed = self._start()
        if failed is not None:
            self.close()
            raise SettingsError(f"reward function {function} cannot be used: {failed}", param="function")

    def __call__(self, sample: Sample) -> Value:
        """Its value; a failure for what it raised, for a hang, and for a child that died."""
        if self._child is None and self._start() is not None:
            self.close()
            return Failure("did not start")
        told = self._ask(sample.to_json(), self._timeout_s)
        if isinstance(told, Failure):
            self.close()
            return told
        if "failed" in told:
            return Failure(str(told["failed"]))
        value = told["value"]
        return UNJUDGED if value is None else float(value)

    def close(self) -> None:
        """Kills the child and whatever it has started; it is started again by the next call."""
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        child.wait()

    def _start(self) -> str | None:
        """Starts a child. What went wrong, or None."""
        limits = [str(self._timeout_s), str(self._start_timeout_s)]
        self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "train.rewards.outside.child", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *_python_path()])},
            start_new_session=True,
        )
        told = self._ask(self._asked, self._start_timeout_s)
        if isinstance(told, Failure):
            return "its import took too long" if told == _TIMEOUT else "its process ended while it was imported"
        return str(told["failed"]) if "failed" in told else None

    def _ask(self, what: Json, timeout_s: float) -> Json | Failure:
        """One line there, one line back."""
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            return Failure("died")
        try:
            child.stdin.write(json.dumps(what).encode() + b"\n")
            child.stdin.flush()
            line = _line(child.stdout, timeout_s + GRACE_S)
        except BrokenPipeError:
            line = b""
        if line is None:
            return _TIMEOUT
        if line:
            told: Json = json.loads(line)
            return told
        try:
            return _TIMEOUT if child.wait(timeout_s + GRACE_S) == -signal.SIGALRM else Failure("died")
        except subprocess.TimeoutExpired:  # it has closed its pipes and goes on
            return _TIMEOUT


def _python_path() -> list[str]:
    return [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]


def _line(pipe: IO[bytes], timeout_s: float) -> bytes | None:
    """The next line; empty where the pipe has ended, None where none came in time. Only one line is ever on its way."""
    deadline = time.monotonic() + timeout_s
    found = bytearray()
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            if not waiting.select(deadline - time.monotonic()):
                return None
            read = os.read(pipe.fileno(), 65536)
            if not read:
                return b""
            found += read
    return bytes(found)
