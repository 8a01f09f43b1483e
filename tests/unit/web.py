"""A folder on a web server of this machine, for tests of what is fetched and what is not."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Web:
    """`url` is the folder's; `asked` the paths of all requests so far."""

    url: str
    asked: list[str] = field(default_factory=list)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, asked: list[str], **more: Any) -> None:
        self._asked = asked
        super().__init__(*args, **more)

    def log_message(self, *args: Any) -> None:
        """Says nothing, and notes what was asked for."""
        self._asked.append(self.path)


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serves the folder until the block ends."""
    asked: list[str] = []
    handler = partial(_Handler, asked=asked, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Web(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
