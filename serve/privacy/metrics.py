"""Counters of redaction and retention on `/metrics`, beside capture's.

Comes in: a `Scrubber`, a `Keeper`. Goes out: a collector in Prometheus' default registry, which vLLM's route serves.
Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from serve.privacy.keeper import Keeper
from serve.privacy.scrub import Scrubber


class PrivacyCollector(Collector):
    """Reads the counts when it is scraped."""

    def __init__(self, scrubber: Scrubber, keeper: Keeper) -> None:
        self._scrubber, self._keeper = scrubber, keeper

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Patterns redacted by kind, metadata dropped, rows and pictures deleted by kind, rounds and failures."""
        redacted = CounterMetricFamily("noria_privacy_redacted", "Patterns replaced before storing.", labels=["kind"])
        for kind, count in self._scrubber.redacted.items():
            redacted.add_metric([kind], count)
        yield redacted
        dropped = self._scrubber.metadata_dropped
        yield CounterMetricFamily("noria_privacy_metadata_dropped", "Pairs of metadata that were not kept.", dropped)
        pruned = CounterMetricFamily("noria_privacy_pruned", "What retention and the sweep deleted.", labels=["kind"])
        for kind, count in asdict(self._keeper.taken).items():
            pruned.add_metric([kind], count)
        yield pruned
        yield CounterMetricFamily("noria_privacy_rounds", "Rounds of retention.", self._keeper.rounds)
        yield CounterMetricFamily("noria_privacy_failures", "Rounds of retention that failed.", self._keeper.failures)


@contextmanager
def exported_privacy(
    scrubber: Scrubber, keeper: Keeper, registry: CollectorRegistry = REGISTRY
) -> Iterator[PrivacyCollector]:
    """The counters, for as long as the block runs."""
    collector = PrivacyCollector(scrubber, keeper)
    registry.register(collector)
    try:
        yield collector
    finally:
        registry.unregister(collector)
