"""The server's side of TLS: one certificate for both wires, taken up anew when its files change.

Comes in: `TlsSettings`. Goes out: an SSL context for uvicorn, credentials for grpc.aio. A pair of files that cannot be
used stops the start with a SettingsError; one that appears later is refused, counted and logged, and the old one stays.
Must not import vllm.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import grpc
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from noria.errors import SettingsError
from noria.settings import TlsSettings
from noria.tls import load_pair, read_pem

CERT, KEY, CLIENT_CA = "server.tls.cert", "server.tls.key", "server.tls.client_ca"
LOOK_S = 5.0
HANDSHAKE_S, GOODBYE_S = 15.0, 1.0

log = logging.getLogger("noria.server")


class Certificates(Collector):
    """The pair in force. `loaded` counts pairs taken up after the first, `refused` those that could not be used."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises SettingsError, naming the setting, for a file that is missing, unreadable, or not of its pair."""
        if settings.cert is None or settings.key is None:
            raise SettingsError("TLS needs server.tls.cert and server.tls.key", param=CERT)
        self._cert, self._key = settings.cert, settings.key
        self._ca = None if settings.client_ca is None else read_pem(settings.client_ca, CLIENT_CA)
        self._require = settings.require_client_cert
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self.loaded = self.refused = 0
        self.context = self._context()
        self._seen = self._marks()
        self._pair = (read_pem(self._key, KEY), read_pem(self._cert, CERT))
        self._given = self._in_context = self._pair

    def credentials(self) -> Any:
        """For `add_secure_port`; every new connection gets the pair that is in force by then."""
        demand = self._ca is not None and self._require
        return grpc.dynamic_ssl_server_credentials(self._configuration(), self._changed, demand)

    async def keep(self) -> None:
        """Looks for new files until it is cancelled, so that HTTPS has them too."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look)
            self.renew_context()

    def renew_context(self) -> None:
        """Gives HTTPS the pair in force; on the event loop only, where handshakes begin: OpenSSL's contexts must not
        be changed beside them."""
        if self._in_context is self._pair:
            return
        try:
            for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):  # half a pair would end the old one
                load_pair(context, self._cert, self._key, (CERT, KEY))
        except SettingsError:
            return  # the files changed again since: the next look tells
        self._in_context = self._pair

    def look(self) -> None:
        """Takes up the pair on disk if it is another one. A file that is half written is refused and tried again
        when it changes."""
        with self._lock:
            marks = self._marks()
            if marks == self._seen:
                return
            self._seen = marks
            try:
                load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._cert, self._key, (CERT, KEY))
                self._pair = (read_pem(self._key, KEY), read_pem(self._cert, CERT))
            except SettingsError as error:
                self.refused += 1
                log.error("certificate_refused", extra={"reason": error.message})
                return
            self.loaded += 1
            log.info("certificate_loaded", extra={"path": str(self._cert)})

    def collect(self) -> Iterable[CounterMetricFamily]:
        """For `/metrics`, in whichever registry it is registered."""
        yield CounterMetricFamily("noria_tls_loaded", "Renewed certificates taken up.", self.loaded)
        yield CounterMetricFamily("noria_tls_refused", "Renewed certificates that could not be used.", self.refused)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        load_pair(context, self._cert, self._key, (CERT, KEY))
        if self._ca is not None:
            try:
                context.load_verify_locations(cadata=self._ca.decode("ascii"))
            except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
                raise SettingsError(f"{CLIENT_CA}: the file holds no certificates: {error}", param=CLIENT_CA) from error
            context.verify_mode = ssl.CERT_REQUIRED if self._require else ssl.CERT_OPTIONAL
        return context

    def _marks(self) -> list[tuple[int, int, int] | None]:
        return [_mark(path.expanduser()) for path in (self._cert, self._key)]

    def _configuration(self) -> Any:
        return grpc.ssl_server_certificate_configuration([self._pair], root_certificates=self._ca)

    def _changed(self) -> Any:
        """gRPC's question before each handshake; None is no change."""
        self.look()
        with self._lock:
            if self._given == self._pair:
                return None
            self._given = self._pair
            return self._configuration()


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Https:
    """Mixed in before `uvicorn.Server` (0.54), which has no setting for how long TLS may take to begin and to end.

    Its own would be 60 and 30 s: every idle connection would hold up an orderly end for so long, because its client
    answers the goodbye only when it next looks.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, on the sockets that are given."""
        server = cast(Any, self)
        await cast(Any, super()).startup(sockets=[])
        server.started = False  # it does not listen yet

        def protocol() -> Any:
            config, state = server.config, server.lifespan.state
            return config.http_protocol_class(config=config, server_state=server.server_state, app_state=state)

        for sock in sockets or []:
            server.servers.append(
                await asyncio.get_running_loop().create_server(
                    protocol,
                    sock=sock,
                    ssl=server.config.ssl,
                    backlog=server.config.backlog,
                    ssl_handshake_timeout=HANDSHAKE_S,
                    ssl_shutdown_timeout=GOODBYE_S,
                )
            )
        server.started = True


def certificates_of(settings: TlsSettings) -> Certificates | None:
    """The certificates, or None where the settings name none. Raises SettingsError."""
    return Certificates(settings) if settings.on else None
