"""How long a connection may take: clients that dawdle must not keep doors and memory of the server.

Comes in: a tree. Goes out: a frozen section. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from pydantic import Field

from noria.module_settings import Section


class DoorSettings(Section):
    """What a slow or silent client may cost, on both wires."""

    head_s: float = Field(20.0, gt=0)
    """Longest time from a connection, or from the first byte of a request on one that is kept open, to the end of the
    request's headers, in seconds. On gRPC: to the end of the handshake."""
    body_window_s: float = Field(20.0, gt=0)
    """While a body is awaited, this many seconds must not pass with less than `body_bytes_per_s` on average."""
    body_bytes_per_s: int = Field(1024, ge=1)
    """The slowest pace at which a body may arrive, in bytes per second."""
    stalled_s: float = Field(60.0, gt=0)
    """How long an answer may wait for a client that does not read on, in seconds; then the connection ends."""
    connections: int = Field(4096, ge=1)
    """Most open HTTP connections; one more is answered with 503 and closed."""
