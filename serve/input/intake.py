"""What one request has brought so far, from its door to its capture.

Comes in: the door's body. Goes out: `Intake`, current in the request's task. Must not import vllm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from serve.input.pictures.admit import Admitted
from serve.input.tree import place_of


@dataclass
class Intake:
    """`body` gives the request's values again: only refusals ask for it, and Anthropic's route.

    `replaced` has, by the URL that the request named, each picture that does not go on as it came; `pixels` are those
    of all pictures so far.
    """

    body: Callable[[], Any]
    replaced: dict[str, Admitted] = field(default_factory=dict)
    pixels: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spend(self, pixels: int, most: int) -> bool:
        """Counts a picture's; whether all are within the most. From any thread: pictures are read side by side."""
        with self._lock:
            self.pixels += pixels
            return self.pixels <= most

    def place(self, url: str) -> str | None:
        """Where in the request the URL stands."""
        return place_of(self.body(), url)


current_intake: ContextVar[Intake | None] = ContextVar("current_intake", default=None)
"""The intake of the request that runs in this task; set by the HTTP middleware and by the gRPC interceptor."""
