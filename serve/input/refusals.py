"""What was refused at the door: the error that says so, and how often for which reason.

Comes in: a reason, a sentence, the field at fault. Goes out: `InputRefused`, and counters for Prometheus.
Must not import vllm.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from noria.errors import InvalidRequest


class InputRefused(InvalidRequest, ValueError):
    """A body or a picture that is not let in. `code` is the reason.

    A ValueError too, because some of vLLM's routes (0.31) answer whatever they do not know with 500.
    """


class Refusals(Collector):
    """Counts refusals by reason; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """How often for each reason."""
        with self._lock:
            return dict(self._counts)

    def count(self, reason: str) -> None:
        """One more."""
        with self._lock:
            self._counts[reason] += 1

    def refuse(self, reason: str, message: str, param: str | None = None) -> InputRefused:
        """The error to raise, counted."""
        self.count(reason)
        return InputRefused(message, param=param, code=reason)

    def collect(self) -> Iterable[CounterMetricFamily]:
        """`noria_input_refused_total{reason}`."""
        family = CounterMetricFamily("noria_input_refused", "Requests refused for what they bring.", labels=["reason"])
        for reason, count in sorted(self.counts.items()):
            family.add_metric([reason], count)
        yield family


def export_refusals(refusals: Refusals, registry: CollectorRegistry = REGISTRY) -> Refusals:
    """Registers the counters; the caller unregisters them at the end."""
    registry.register(refusals)
    return refusals
