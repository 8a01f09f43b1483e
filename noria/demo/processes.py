"""Starts the whole system for the demo as an operator would, `noria up` on free ports, and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from noria.errors import Unavailable

START_S = 1500
STOP_S = 60


@contextmanager
def running_system(
    home: Path, *, log: Path, console: Console, model: str | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs `noria up` and yields its URL once it serves; its output goes to `log`.

    `model` is a checkpoint, the embedded one when none is given; `settings` are more `NORIA_*` variables.

    Raises Unavailable with the log's last lines when it ends early or does not serve within 25 minutes. SIGTERM ends
    the caller by SystemExit from here on, so that what was started is ended too; call it in the main thread.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "noria", "up", "--http-port", "0", "--grpc-port", "0"]
    command += ["--model", model] if model else []
    environment = {**os.environ, "NORIA_HOME": str(home), "NORIA_TRAIN__POLICY__AUTOMATIC": "false", **(settings or {})}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)  # noqa: S603 - our own command
    try:
        with console.status(f"starting (the first time the embedded model is built; log: {log})"):
            url = _wait(process, home / "server.json", log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if ready.exists():
            return str(json.loads(ready.read_text())["url"])
        if process.poll() is not None:
            break
        time.sleep(0.3)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise Unavailable(f"`noria up` did not come to serve; the end of {log}:\n{tail}")
