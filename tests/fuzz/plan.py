"""How many malformed requests of which strategy, in which order.

Comes in: how many in all, a seed. Goes out: batches of cases, mixed over the wires.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tests.fuzz import bodies, messages
from tests.fuzz.cases import Case, drawn

BATCH = 500  # large bodies are many bytes: no more of them than one batch's are held at once
SHARES: tuple[tuple[Any, float], ...] = (
    (bodies.http_cases, 0.52),
    (messages.grpc_cases, 0.36),
    (bodies.giant(), 0.02),
    (bodies.broken_frames(), 0.05),
    (messages.broken_frames(), 0.05),
)


def batches(requests: int, seed: int) -> Iterator[list[Case]]:
    """At least `requests` cases, the same ones for the same seed."""
    number = 0
    while requests > 0:
        size = min(BATCH, requests)
        cases: list[Case] = []
        for place, (strategy, share) in enumerate(SHARES):
            cases += drawn(strategy, max(1, round(size * share)), (seed * 10_000 + number) * len(SHARES) + place)
        random.Random(seed + number).shuffle(cases)  # noqa: S311  an order, no secret
        yield cases
        requests -= len(cases)
        number += 1
