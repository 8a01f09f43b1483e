"""The handlers that both wires call: `/noria/v1` over HTTP and `noria.v1` over gRPC.

Comes in: the server's parts, through the constructor. Goes out: `Handlers`, whose methods take and give plain
dicts and raise NoriaError. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from noria.blobs import Blobs
from noria.records import Json
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from serve.api.judgements import Judgements
from serve.api.operations import Operations
from serve.api.ports import Capture, Gate
from serve.privacy.scrub import Scrubber


class Handlers(Judgements, Operations):
    """Everything that `/noria/v1` and `noria.v1` offer, apart from answering prompts."""

    def __init__(
        self,
        *,
        store: Store,
        registry: Registry,
        blobs: Blobs,
        gate: Gate,
        capture: Capture,
        settings: Settings,
        scrubber: Scrubber | None = None,
        kept: Callable[[], Json] = dict[str, Any],
    ) -> None:
        """`scrubber` is made from the settings where none is given; `kept` adds retention's figures to the status."""
        scrubber = scrubber or Scrubber(settings.privacy)
        Judgements.__init__(self, store, blobs, capture, scrubber)
        Operations.__init__(self, store, registry, gate, capture, settings)
        self.settings = settings
        self._kept = kept

    async def status(self) -> Json:
        """The operator's status, and what was redacted, dropped and deleted since the server started."""
        counts = {"redacted": self._scrubber.redacted, "metadata_dropped": self._scrubber.metadata_dropped}
        return {**await super().status(), "privacy": {**counts, **self._kept()}}

    @property
    def api_key(self) -> str | None:
        """The bearer key that callers must show, or None."""
        key = self.settings.server.api_key
        return key.get_secret_value() if key else None
