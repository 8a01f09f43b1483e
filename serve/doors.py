"""The two listening sides of the server: uvicorn and grpc.aio, opened early, drained together.

Comes in: an ASGI application, a grpc.aio server. Goes out: bound ports, and an orderly end. vLLM is imported inside
functions only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import REGISTRY

from noria.errors import SettingsError
from noria.settings import DoorSettings, ServerSettings
from serve.tls import Https
from serve.wires.metrics import export_ended
from serve.wires.patience import Reason, patient

logger = logging.getLogger("noria.server")


def bind_http(settings: ServerSettings) -> socket.socket:
    """A bound socket, before anything slow begins: a taken port is told at once. Raises SettingsError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.http_port))
    except OSError as error:
        sock.close()
        where = f"{settings.host}:{settings.http_port}"
        raise SettingsError(f"cannot listen for HTTP on {where}: {error}", param="server.http_port") from error
    return sock


class Doors:
    """HTTP and gRPC, started together and closed together."""

    def __init__(
        self,
        app: Any,
        state: Any,
        sock: socket.socket,
        grpc_server: Any,
        shutdown_s: float,
        limits: DoorSettings | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        before_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`app` is the wrapped application; `state` vLLM's, which its exception handler reads the server from.

        Without a `grpc_server` there is HTTP alone; with `tls` it is HTTPS. `limits` end connections that dawdle.
        `before_close` runs while both still take calls: whoever watches the server's health learns of its end first.
        """
        import uvicorn
        from vllm.entrypoints.launchers.launcher import NoSignalServer

        limits = limits or DoorSettings()
        self.ended: Counter[Reason] = Counter()
        self._exported = export_ended(self.ended)
        config = uvicorn.Config(
            app,
            http=patient(limits, self.ended),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(shutdown_s),
            timeout_keep_alive=math.ceil(limits.keep_alive_s),
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
        server = NoSignalServer if tls is None else type("HttpsServer", (Https, NoSignalServer), {})
        self._http = state.server = server(config)
        self._sock, self._grpc, self._shutdown_s = sock, grpc_server, shutdown_s
        self._before_close = before_close
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Returns when both answer."""
        if self._grpc is not None:
            await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._sock]))
        while not self._http.started and not self._serving.done():  # noqa: ASYNC110  uvicorn's flag
            await asyncio.sleep(0.01)
        if self._serving.done():
            await self._serving

    async def close(self) -> None:
        """Takes no new connection, lets running requests end within `shutdown_s`, then cancels them."""
        if self._before_close is not None:
            await self._before_close()
        self._http.should_exit = True
        grpc_stop = None if self._grpc is None else asyncio.ensure_future(self._grpc.stop(self._shutdown_s))
        if self._serving is not None:
            await self._serving
        if grpc_stop is not None:
            await grpc_stop
        self._sock.close()
        REGISTRY.unregister(self._exported)

    def force(self) -> None:
        """A second signal: running requests are not waited for."""
        self._http.force_exit = True
