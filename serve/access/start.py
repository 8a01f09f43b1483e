"""Puts the keys before a running server, with their counters on `/metrics`.

Comes in: the store, settings, the audit log. Goes out: an `Access` for as long as a block runs.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from noria.access.loopback import is_loopback, require_keys_beyond_loopback
from noria.settings import ServerSettings
from noria.store import Store
from serve.access.audit import Audit
from serve.access.keys import Access


@asynccontextmanager
async def access_over(
    store: Store, server: ServerSettings, audit: Audit, registry: CollectorRegistry = REGISTRY
) -> AsyncIterator[Access]:
    """The server's keys. Raises SettingsError where it would listen to others without any, Unavailable."""
    access = Access(store, server)
    collector = AccessCollector(access, audit)
    try:
        await access.load()
        require_keys_beyond_loopback(server, access.keyed)
        registry.register(collector)
        try:
            yield access
        finally:
            registry.unregister(collector)
    finally:
        await access.close()


def said_of_keys(access: Access, server: ServerSettings) -> str | None:
    """What an operator should know at the start of a server that asks for no key; None where it does."""
    if access.keyed:
        return None
    if is_loopback(server.host):
        return "no key is configured: only this machine is listened to, and every caller may do everything"
    return f"INSECURE: no key is configured, and whoever reaches {server.host} may do everything"


class AccessCollector(Collector):
    """Reads the counters when it is scraped."""

    def __init__(self, access: Access, audit: Audit) -> None:
        self._access, self._audit = access, audit

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Refused calls by reason; lines of the audit log, written and lost."""
        refused = CounterMetricFamily("noria_access_refused", "Calls that were not let in.", labels=["reason"])
        for reason, count in asdict(self._access.refusals).items():
            refused.add_metric([reason], count)
        yield refused
        yield CounterMetricFamily("noria_audit_written", "Lines of the audit log.", self._audit.written)
        yield CounterMetricFamily("noria_audit_lost", "Lines that the store did not take.", self._audit.lost)
