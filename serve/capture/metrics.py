"""Capture's counters on `/metrics`, beside vLLM's own.

Comes in: a `CaptureQueue`. Goes out: a collector in Prometheus' default registry, which vLLM's route serves.
Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serve.capture.queue import CaptureQueue


class CaptureCollector(Collector):
    """Reads the queue's counters when it is scraped, so that counting costs the request path nothing."""

    def __init__(self, queue: CaptureQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """sent, stored, dropped, retries and waiting; sent = stored + dropped + waiting."""
        counts = self._queue.counts
        yield CounterMetricFamily("noria_capture_sent", "Completions offered to capture.", counts.sent)
        yield CounterMetricFamily("noria_capture_stored", "Completions committed to the store.", counts.stored)
        yield CounterMetricFamily(
            "noria_capture_dropped", "Completions lost to a full queue or a failed write.", counts.dropped
        )
        yield CounterMetricFamily("noria_capture_retries", "Writes that failed and were tried again.", counts.retries)
        yield GaugeMetricFamily("noria_capture_waiting", "Completions that wait for their commit.", counts.waiting)


def export_capture(queue: CaptureQueue, registry: CollectorRegistry = REGISTRY) -> CaptureCollector:
    """Registers the counters; the caller unregisters the collector when the queue is closed."""
    collector = CaptureCollector(queue)
    registry.register(collector)
    return collector
