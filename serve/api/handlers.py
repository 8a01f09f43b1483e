"""The handlers that both wires call: `/noria/v1` over HTTP and `noria.v1` over gRPC.

Comes in: the server's parts, through the constructor. Goes out: `Handlers`, whose methods take and give plain
dicts and raise NoriaError. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from noria.blobs import Blobs
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from serve.access.limits.judgements import CallerLimits
from serve.access.limits.limits import Limits
from serve.api.judgements import Judgements
from serve.api.operations import Operations
from serve.api.ports import Capture, Gate, KeyLimits


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
        limits: KeyLimits | None = None,
    ) -> None:
        """Without `limits` the settings' own count preferences, and nothing else is counted."""
        limits = limits or CallerLimits(Limits(settings.limits, sequences=1), store)
        Judgements.__init__(self, store, blobs, capture, limits)
        Operations.__init__(self, store, registry, gate, capture, settings)
        self.settings = settings

    @property
    def api_key(self) -> str | None:
        """The bearer key that callers must show, or None."""
        key = self.settings.server.api_key
        return key.get_secret_value() if key else None
