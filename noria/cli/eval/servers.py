"""Who answers an evaluation: the running server where it serves the version, else a server of our own beside it.

Comes in: the home and a version. Goes out: a `Target` for as long as a block runs; what was started is ended after it.
Must not import serve.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noria.cli.context import Place, live_server, say
from noria.cli.run import environment_of, python_m
from noria.cli.up.supervisor import Child, Stop, end
from noria.client import NoriaClient
from noria.errors import Unavailable
from noria.evals.ask import Target
from noria.settings import Settings

START_S = 1800.0  # every byte of the version is checked and loaded before the first answer
STOP_S = 40.0
TAIL_LINES = 20


@contextmanager
def server_of(here: Place, settings: Settings, version: str) -> Iterator[Target]:
    """A server that answers as `version`. Raises Unavailable when one named with --url, or our own, does not answer."""
    key = settings.shown_key
    url = running_url(here, settings, version, key)
    if url is not None:
        yield Target(url, version, "live", key, settings.trust)
        return
    say(f"starting a server for {version} beside what is live ...")
    with aside(here, settings, version) as told:
        yield Target(str(told["url"]), version, "aside", key)


def running_url(here: Place, settings: Settings, version: str, api_key: str | None) -> str | None:
    """The URL of the server that answers as `version` now, or None.

    Raises the NoriaError of a server that was named with --url or NORIA_URL; the home's own may be just starting.
    """
    told = None if here.url else live_server(settings.home)
    if here.url is None and told is None:
        return None
    url = here.url or str(told["url"] if told else "")
    try:
        with NoriaClient(url, api_key=api_key, trust=settings.trust) as client:
            return url if client.status().get("serving") == version else None
    except Unavailable:
        if here.url is not None:
            raise
        return None


@contextmanager
def aside(here: Place, settings: Settings, version: str) -> Iterator[dict[str, Any]]:
    """Runs `python -m serve --aside` for the version on a free port; its `aside-PID.json` while it answers.

    Raises Unavailable with the last lines of its output when it does not come to answer.
    """
    log = settings.home / f"aside-{os.getpid()}.log"
    flags = ["--aside", "--model", version, "--host", "127.0.0.1", "--http-port", "0"]
    with log.open("wb") as output:
        child = Child("aside", python_m("serve", flags), environment_of(here), output=output.fileno())
        child.start()
        pid = child.process.pid if child.process else 0
        ready = settings.home / f"aside-{pid}.json"
        try:
            yield _wait(child, ready, version, log)
        finally:
            end([child], Stop(), STOP_S)
            ready.unlink(missing_ok=True)
            log.unlink(missing_ok=True)


def _wait(child: Child, ready: Path, version: str, log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if ready.exists():
            told: dict[str, Any] = json.loads(ready.read_text())
            return told
        if not child.running:
            break
        time.sleep(0.2)
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    raise Unavailable(
        f"the server for {version} did not come to answer; on a GPU that the live server fills, run with "
        "NORIA_ENGINE__GPU_MEMORY_UTILIZATION set to what is free. Its last lines: " + " | ".join(lines)
    )
