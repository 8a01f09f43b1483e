"""How the two wires carry calls: TLS for both, and what gRPC's connections are allowed.

Comes in: a tree. Goes out: frozen sections. Must not import grpc, torch, vllm or fastapi.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from noria.module_settings import Section


class TlsSettings(Section):
    """TLS on both wires: HTTPS and gRPC with the same certificate. Without `cert` and `key` both are plain."""

    cert: Path | None = None
    """PEM file of the server's certificate, with its intermediates below it. A renewed file is taken up while the
    server runs."""
    key: Path | None = None
    """PEM file of the certificate's private key, without a passphrase."""
    client_ca: Path | None = None
    """PEM file of the authorities whose client certificates are accepted (mutual TLS); none asks callers for none.
    Read at the start only."""
    require_client_cert: bool = True
    """With `client_ca`: refuse who shows no certificate. False checks a certificate where one is shown on HTTP; gRPC
    then asks for none."""
    name: str | None = None
    """The host name in the certificate, under which this machine's own commands reach the server; none is
    `server.host`."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.cert is None) != (self.key is None):
            missing, given = ("key", "cert") if self.key is None else ("cert", "key")
            raise ValueError(f"server.tls.{given} is set without server.tls.{missing}: TLS needs both")
        if self.client_ca is not None and self.cert is None:
            raise ValueError("server.tls.client_ca is set without server.tls.cert and server.tls.key: TLS needs both")
        return self

    @property
    def on(self) -> bool:
        """Whether the wires speak TLS."""
        return self.cert is not None


class GrpcSettings(Section):
    """What gRPC's messages and connections are allowed."""

    max_message_mib: int = Field(64, ge=1, le=1024)
    """Largest message either way, in MiB; pictures travel inside. A larger one ends with RESOURCE_EXHAUSTED."""
    compression: Literal["gzip", "none"] = "gzip"
    """How whole answers are packed for callers who accept it; the pieces of streams never are. Packed requests are
    always taken."""
    keepalive_time_s: float = Field(60.0, ge=1)
    """How long a connection may be silent before the server pings it, in seconds."""
    keepalive_timeout_s: float = Field(20.0, ge=1)
    """How long it waits for the answer before it drops the connection, and the generations on it, in seconds."""
    permit_without_calls: bool = True
    """Take and send pings also while no call runs, so that clients may keep connections open."""
    max_streams: int = Field(1024, ge=1)
    """Calls that run on one connection at once; further ones wait at their sender."""
    min_ping_interval_s: float = Field(10.0, ge=0)
    """The shortest time between a client's pings, in seconds; quicker ones are strikes."""
    max_ping_strikes: int = Field(2, ge=0)
    """Strikes after which a connection is closed (too_many_pings); 0 closes none."""
    max_connection_age_s: float | None = Field(None, ge=1)
    """Age at which a client is asked to connect anew, in seconds, so that load spreads over new servers; none is never.
    Calls that run may go on for `server.shutdown_s`."""


class DoorSettings(Section):
    """What a slow or silent client may cost, on both wires."""

    head_s: float = Field(20.0, gt=0)
    """Longest time from a connection, or from the first byte of a request on one that is kept open, to the end of the
    request's headers, in seconds. On gRPC: to the end of the handshake."""
    body_window_s: float = Field(20.0, gt=0)
    """While a body is awaited, this many seconds must not pass with less than `body_bytes_per_s` on average."""
    body_bytes_per_s: int = Field(8192, ge=1)
    """The slowest pace at which a body may arrive, in bytes per second."""
    message_s: float = Field(60.0, gt=0)
    """Longest time from the beginning of a gRPC call to the end of its message, in seconds; 5 s where others wait for
    its place."""
    messages: int = Field(64, ge=1)
    """gRPC messages that are read at once, of `server.grpc.max_message_mib` at most each; others wait at their senders.
    Fewer hold less, and hold up a crowd on a busy machine."""
    keep_alive_s: float = Field(75.0, ge=1)
    """How long an HTTP connection is kept open between requests, in seconds. Longer than clients and balancers keep
    theirs, or now and then one asks on a connection that is just being closed."""
    stalled_s: float = Field(60.0, gt=0)
    """How long an answer may wait for a client that does not read on, in seconds; then the connection ends."""
    connections: int = Field(4096, ge=1)
    """Most open connections, on HTTP and on gRPC each. One more is closed, on HTTP with a 503."""
