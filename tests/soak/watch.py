"""Looks at a server once a second while others keep it busy.

Comes in: its address and its process. Goes out: the largest and the first values of memory, queues and connections.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.memory import family_mib, rss_mib

METRIC = re.compile(r"^(vllm:num_requests_(?:waiting|running))(?:\{[^}]*\})? ([0-9.e+]+)$", re.M)


@dataclass(frozen=True)
class Sample:
    """One look. `uncommitted` are completions that wait for their commit; `took_s` is the time of the status call."""

    at_s: float
    server_mib: float
    family_mib: float
    in_flight: int
    uncommitted: int
    waiting: float
    running: float
    sockets: int
    took_s: float


@dataclass
class Watch:
    """All looks so far; `missed` are those that the server did not answer."""

    url: str
    pid: int
    samples: list[Sample] = field(default_factory=list)
    missed: int = 0

    async def run(self) -> None:
        """Looks until it is cancelled."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            while True:
                try:
                    self.samples.append(await self._look(http))
                except httpx.HTTPError:
                    self.missed += 1
                await asyncio.sleep(1.0)

    async def _look(self, http: httpx.AsyncClient) -> Sample:
        began = time.monotonic()
        answer = await http.get("/noria/v1/status")
        status = answer.raise_for_status().json()
        took_s = time.monotonic() - began
        metrics = dict(METRIC.findall((await http.get("/metrics")).text))
        capture = status["capture"]
        return Sample(
            at_s=began,
            server_mib=rss_mib(self.pid),
            family_mib=family_mib(self.pid),
            in_flight=status["in_flight"],
            uncommitted=capture["sent"] - capture["stored"] - capture["dropped"],
            waiting=float(metrics.get("vllm:num_requests_waiting", 0)),
            running=float(metrics.get("vllm:num_requests_running", 0)),
            sockets=sockets(self.pid),
            took_s=took_s,
        )


def sockets(pid: int) -> int:
    """Open sockets of a process."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += entry.readlink().name.startswith("socket:")
        except OSError:
            continue
    return found
