"""The handlers that both wires call: `/noria/v1` over HTTP and `noria.v1` over gRPC.

Comes in: the server's parts, through the constructor. Goes out: `Handlers`, whose methods take and give plain
dicts and raise NoriaError; those that change something for an operator leave a line in the audit log.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from noria.blobs import Blobs
from noria.records import Json
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from serve.access.audit import Audit
from serve.access.limits.judgements import CallerLimits
from serve.access.limits.limits import Limits
from serve.api.judgements import Judgements
from serve.api.operations import Operations
from serve.api.ports import Capture, Gate, KeyLimits
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
        audit: Audit | None = None,
        limits: KeyLimits | None = None,
        scrubber: Scrubber | None = None,
        kept: Callable[[], Json] = dict[str, Any],
    ) -> None:
        """What is not given is made: an `audit` over the same store, `limits` and a `scrubber` from the settings.

        `kept` adds retention's figures to the status.
        """
        limits = limits or CallerLimits(Limits(settings.limits, sequences=1), store)
        Judgements.__init__(self, store, blobs, capture, limits, scrubber or Scrubber(settings.privacy))
        Operations.__init__(self, store, registry, gate, capture, settings)
        self.settings = settings
        self.audit = audit or Audit(store)
        self._kept = kept

    async def status(self) -> Json:
        """The operator's status, and what was redacted, dropped and deleted since the server started."""
        counts = {"redacted": self._scrubber.redacted, "metadata_dropped": self._scrubber.metadata_dropped}
        return {**await super().status(), "privacy": {**counts, **self._kept()}}

    async def create_job(self, body: Mapping[str, Any]) -> Json:
        """As `Operations` does it, audited."""
        async with self.audit.action("create_job") as noted:
            job = await super().create_job(body)
            noted.target = job["id"]
            return job

    async def cancel_job(self, job_id: str) -> Json:
        """As `Operations` does it, audited."""
        async with self.audit.action("cancel_job", job_id):
            return await super().cancel_job(job_id)

    async def create_rollout(self, body: Mapping[str, Any]) -> Json:
        """As `Operations` does it, audited under the version."""
        async with self.audit.action("create_rollout", _named(body, "version")):
            return await super().create_rollout(body)

    async def rollback(self) -> Json:
        """As `Operations` does it, audited under the version that is to come back."""
        async with self.audit.action("rollback") as noted:
            rollout = await super().rollback()
            noted.target = rollout["version"]
            return rollout

    async def delete_preference(self, preference_id: str) -> Json:
        """As `Judgements` does it, audited."""
        async with self.audit.action("delete_preference", preference_id):
            return await super().delete_preference(preference_id)

    async def delete_feedback(self, feedback_id: str) -> Json:
        """As `Judgements` does it, audited."""
        async with self.audit.action("delete_feedback", feedback_id):
            return await super().delete_feedback(feedback_id)

    async def forget_end_user(self, user: str) -> Json:
        """As `Judgements` does it, audited without the user: the log must not remember whom it was to forget."""
        async with self.audit.action("forget_end_user"):
            return await super().forget_end_user(user)

    async def list_audit_events(self, query: Mapping[str, Any]) -> Json:
        """A page of the audit log, newest first."""
        return await self.audit.list_events(query)


def _named(body: object, key: str) -> str | None:
    """The text under a key of a body that nobody has checked yet."""
    value = body.get(key) if isinstance(body, Mapping) else None
    return value if isinstance(value, str) else None
