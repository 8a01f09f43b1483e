"""What one request has brought so far, from its door to its capture.

Comes in: the door's body. Goes out: `Intake`, current in the request's task. Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from serve.input.pictures.admit import Admitted
from serve.input.tree import place_of


@dataclass
class Intake:
    """`body` gives the request's values again, for it is asked only where something is refused.

    `replaced` has, by the URL that the request named, each picture that does not go on as it came; `pixels` are those
    of all pictures so far.
    """

    body: Callable[[], Any]
    replaced: dict[str, Admitted] = field(default_factory=dict)
    pixels: int = 0

    def place(self, url: str) -> str | None:
        """Where in the request the URL stands."""
        return place_of(self.body(), url)


current_intake: ContextVar[Intake | None] = ContextVar("current_intake", default=None)
"""The intake of the request that runs in this task; set by the HTTP middleware and by the gRPC interceptor."""
