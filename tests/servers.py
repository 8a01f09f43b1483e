"""Starts real servers for tests, and gives them a model to serve.

Comes in: an empty home. Goes out: a published version in it, and a running `python -m serve` with its addresses.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from noria.registry import Base, ManifestDraft, Registry
from noria.store import Store
from tests.tiny import build_tiny_vlm

START_S = 240.0
STOP_S = 60.0


@dataclass
class Server:
    """A running server. `log` is its output so far, on disk."""

    url: str
    grpc: str
    process: subprocess.Popen[bytes]
    home: Path
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals the server and waits for its end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_S)


def publish_tiny(home: Path, *, parent: str | None = None, seed: int = 0, dtype: str = "bfloat16") -> str:
    """Publishes a tiny random VLM, not quantised, as the home's next version; its id. Nothing is made live."""
    store = Store.open(f"sqlite:///{home / 'noria.db'}")
    try:
        registry = Registry(home / "models", store)
        staging = registry.begin("tiny")
        build_tiny_vlm(staging / "serving", seed=seed, dtype=dtype)
        base = Base(name="tiny", path="masters/tiny")
        draft = ManifestDraft(parent=parent, base=base, method="import", architecture="llava", job=None)
        return registry.publish(staging, draft).id
    finally:
        store.close()


@contextmanager
def start_server(home: Path, *flags: str, **env: str) -> Iterator[Server]:
    """Runs `python -m serve` over the home on free ports until the block ends; `env` adds to its environment.

    Raises RuntimeError with the server's output when it ends before it is ready, or is not ready in time.
    """
    log = home / "server.log"
    told = home / "server.json"
    told.unlink(missing_ok=True)
    environment = {**os.environ, "NORIA_HOME": str(home), **env}
    command = [sys.executable, "-m", "serve", "--http-port=0", "--grpc-port=0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_S
        while not told.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start ({process.poll()}):\n{log.read_text()[-8000:]}")
            time.sleep(0.1)
        info = json.loads(told.read_text())
        yield Server(info["url"], info["grpc"], process, home, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
