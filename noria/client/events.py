"""Watching a job: server-sent events, and where a broken stream goes on. Shared by both clients; does no input.

Comes in: lines of a `text/event-stream` (WHATWG HTML, 9.2). Goes out: events.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import httpx

from noria.client.shapes import JobEvent
from noria.errors import Unavailable

ENDED = frozenset({"succeeded", "failed", "cancelled"})
RECONNECTS = 20
TIMEOUT = httpx.Timeout(30.0, read=120.0)


@dataclass
class Watch:
    """How far a job has been watched. A stream that breaks is begun again after the last event that came."""

    job_id: str
    after: int = 0
    failures: int = 0
    _data: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where the events are."""
        return f"/noria/v1/jobs/{self.job_id}/events"

    def begin(self) -> dict[str, int]:
        """The query of the next connection."""
        self._data.clear()
        return {"after": self.after}

    def feed(self, line: str) -> JobEvent | None:
        """Takes a line; the event that it ends, if any. Comments and `[DONE]` are none."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
        elif not line and self._data:
            text = "\n".join(self._data)
            self._data.clear()
            if text != "[DONE]":
                event: JobEvent = json.loads(text)
                self.after, self.failures = max(self.after, int(event["seq"])), 0
                return event
        return None

    def failed(self, error: Unavailable) -> None:
        """Counts a broken connection. Raises the error after too many in a row."""
        self.failures += 1
        if self.failures > RECONNECTS:
            raise error

    @property
    def pause_s(self) -> float:
        """How long to wait before the next connection."""
        return 0.2 if self.failures == 0 else 1.0
