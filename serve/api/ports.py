"""What the handlers need of the rest of the server, as small Protocols.

Comes in: nothing. Goes out: `Gate`, `Capture`, `KeyLimits`, satisfied by `serve.engine`, `serve.capture` and
`serve.access.limits`, and by the tests'
small classes. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from noria.records import Json


class Serving(Protocol):
    """The version that the engine has loaded."""

    @property
    def id(self) -> str:
        """`v7`."""
        ...

    @property
    def fingerprint(self) -> str:
        """`v7-1a2b3c4d`."""
        ...


class Gate(Protocol):
    """Knows which version new requests get, and how many are inside."""

    @property
    def current(self) -> Serving:
        """The version that new requests get."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that run now."""
        ...


class Capture(Protocol):
    """The queue between answers and the store; `sent = stored + dropped` once it is flushed."""

    @property
    def sent(self) -> int:
        """Completions offered."""
        ...

    @property
    def stored(self) -> int:
        """Completions committed."""
        ...

    @property
    def dropped(self) -> int:
        """Completions lost to a full queue or a failed write."""
        ...

    async def flush(self, completion_id: str | None = None) -> None:
        """Returns when that completion (or everything offered so far) is committed or known to be dropped."""
        ...


class Recording(Protocol):
    """One judgement that is being recorded."""

    new: bool
    """To be set False where the same was recorded before: it does not count then."""


class KeyLimits(Protocol):
    """The limits of whoever calls."""

    def recording(self) -> AbstractAsyncContextManager[Recording]:
        """Around the recording of one judgement. Raises RateLimited."""
        ...

    async def describe(self) -> Json:
        """The caller's limits and what is used of them."""
        ...
