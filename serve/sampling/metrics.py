"""Sampling's counters on `/metrics`. vLLM's own histograms there count its requests with the users'.

Comes in: a `Sampling`. Goes out: a collector in Prometheus' default registry, which vLLM's route serves.
Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serve.sampling.service import Sampling


class SamplingCollector(Collector):
    """Reads the counters when it is scraped."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Groups by how they ended, samples, tokens, turns given up for users' sake, adapters."""
        counts, turns = self._sampling.counts, self._sampling.turns
        groups = CounterMetricFamily("noria_sampling_groups", "Groups, by how they ended.", labels=["outcome"])
        for outcome in ("done", "ended", "refused"):
            groups.add_metric([outcome], getattr(counts, outcome))
        yield groups
        yield CounterMetricFamily("noria_sampling_samples", "Samples in answered groups.", counts.samples)
        told = "Tokens sampled, those of groups that were ended too."
        yield CounterMetricFamily("noria_sampling_tokens", told, self._sampling.tokens)
        yield CounterMetricFamily("noria_sampling_set_back", "Samples that gave way to users.", turns.set_back)
        yield CounterMetricFamily("noria_sampling_adapters_put", "Policy adapters that were loaded.", counts.adapters)
        held = len(self._sampling.shelf.held())
        yield GaugeMetricFamily("noria_sampling_adapters", "Policy adapters that are loaded.", held)
        yield GaugeMetricFamily("noria_sampling_running", "Samples in the engine.", turns.running)
        yield GaugeMetricFamily("noria_sampling_waiting", "Samples that wait for a turn.", turns.waiting)


def export_sampling(sampling: Sampling, registry: CollectorRegistry = REGISTRY) -> SamplingCollector:
    """Registers the counters; the caller unregisters the collector at the end."""
    collector = SamplingCollector(sampling)
    registry.register(collector)
    return collector
