"""grpc.health.v1, a status for each service: what load balancers and Kubernetes ask.

Comes in: the server's ups and downs. Goes out: SERVING or NOT_SERVING. Services that need the engine (inference,
sampling, and the server as a whole) stop serving when the engine is lost; all of them do before the server ends.
Must not import vllm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health, health_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NEED_ENGINE = ("", "noria.v1.InferenceService", "noria.v1.SamplingService")


class Health(health.aio.HealthServicer):
    """The standard servicer, whose watchers do not hold up the server's end."""

    def __init__(self) -> None:
        super().__init__()
        self._over = asyncio.Event()
        self._watchers: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, services: Iterable[str]) -> None:
        """All of them serve."""
        for name in services:
            await self.set(name, SERVING)

    def engine_lost(self) -> None:
        """Nothing that needs the engine serves any more; called on the event loop, where nothing is awaited."""
        task = asyncio.ensure_future(self._lose_engine())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Says NOT_SERVING for all, to those who ask and to those who watch, and ends the watchers' streams."""
        await self.enter_graceful_shutdown()
        self._over.set()
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=1.0)

    async def Watch(self, request: Any, context: Any) -> None:
        """As the standard's, but it ends with the server: an endless stream would use up the whole `shutdown_s`."""
        watching = asyncio.ensure_future(super().Watch(request, context))
        over = asyncio.ensure_future(self._over.wait())
        self._watchers.add(watching)
        try:
            await asyncio.wait({watching, over}, return_when=asyncio.FIRST_COMPLETED)
            if over.done() and not watching.done():
                await asyncio.sleep(0.05)  # the last status is on its way
        finally:
            for task in (watching, over):
                task.cancel()
            await asyncio.gather(watching, over, return_exceptions=True)
            self._watchers.discard(watching)

    async def _lose_engine(self) -> None:
        for name in NEED_ENGINE:
            await self.set(name, NOT_SERVING)
