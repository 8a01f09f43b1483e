"""What was refused and what is inside, on `/metrics`.

Comes in: `Limits`. Goes out: a collector in Prometheus' default registry, which vLLM's route serves; and `limits_over`,
the limits for as long as a server runs. Must not import vllm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from noria.settings import LimitSettings
from serve.access.limits.limits import Limits
from serve.access.limits.tokens import TokenStore


class LimitsCollector(Collector):
    """Reads the counters when it is scraped. No label names a key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Refusals by reason, what is inside and waits, bytes of bodies, writes of the tokens that failed."""
        limits, load = self._limits, self._limits.load
        refused = CounterMetricFamily("noria_requests_refused", "Requests refused by a limit.", labels=["reason"])
        for reason, count in limits.refused.items():
            refused.add_metric([reason], count)
        yield refused
        yield GaugeMetricFamily("noria_requests_inside", "Users' sequences inside, running or waiting.", load.demand)
        yield GaugeMetricFamily("noria_requests_waiting", "Those past what the engine runs at once.", load.waiting)
        yield GaugeMetricFamily("noria_body_bytes", "Bytes of request bodies that are held.", load.body_bytes)
        told = "Writes of the tokens of the day that failed and were tried again."
        yield CounterMetricFamily("noria_token_writes_failed", told, limits.tokens.failed_writes)


@asynccontextmanager
async def limits_over(
    settings: LimitSettings, sequences: int, store: TokenStore | None = None
) -> AsyncIterator[Limits]:
    """Limits with the day's tokens read, written now and then and at the end, and their counters exported."""
    limits = Limits(settings, sequences, store)
    await limits.tokens.load()
    collector = LimitsCollector(limits)
    REGISTRY.register(collector)
    keeping = asyncio.create_task(limits.tokens.keep(), name="limits")
    try:
        yield limits
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        REGISTRY.unregister(collector)
        await limits.tokens.write()
