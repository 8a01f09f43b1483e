"""The connections that were ended for dawdling, on `/metrics`.

Comes in: their counts by reason. Goes out: a collector in Prometheus' default registry, which vLLM's route serves.
Must not import vllm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from serve.wires.patience import REASONS, Reason


class EndedCollector(Collector):
    """Reads the counts when it is scraped."""

    def __init__(self, ended: Counter[Reason]) -> None:
        self._ended = ended

    def collect(self) -> Iterable[CounterMetricFamily]:
        """HTTP connections that the server ended, by reason."""
        family = CounterMetricFamily(
            "noria_http_connections_ended", "HTTP connections ended by the server, by reason.", labels=["reason"]
        )
        for reason in REASONS:
            family.add_metric([reason], self._ended[reason])
        yield family


def export_ended(ended: Counter[Reason], registry: CollectorRegistry = REGISTRY) -> EndedCollector:
    """Registers the counts; the caller unregisters the collector at the end."""
    collector = EndedCollector(ended)
    registry.register(collector)
    return collector
