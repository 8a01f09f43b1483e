"""The demo's annotator, a stated rule, and the win rate that it gives one version over another.

The rule: an answer that contains the fact beats one that does not; of two that contain it the clearly shorter wins;
lengths less than a tenth apart are a tie; if neither contains it, both are bad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Judgement = Literal["first", "second", "tie", "both_bad"]

CLEARLY = 0.9  # of the other's length: a few letters more or less are chance, and would teach it


def judge(first: str, second: str, fact: str) -> Judgement:
    """Applies the rule to two answers of one question."""
    right_first, right_second = (fact.lower() in answer.lower() for answer in (first, second))
    if not (right_first or right_second):
        return "both_bad"
    if right_first != right_second:
        return "first" if right_first else "second"
    length_first, length_second = len(first.strip()), len(second.strip())
    if length_first <= CLEARLY * length_second:
        return "first"
    return "second" if length_second <= CLEARLY * length_first else "tie"


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that the first side won, a tie or both bad counting half.

    `low` and `high` are the 95 % Wilson score interval (Wilson 1927, JASA 22:209-212) at this rate and `n`.
    """

    rate: float
    low: float
    high: float
    n: int
    wins: int
    losses: int


def win_rate(judgements: Iterable[Judgement]) -> WinRate:
    """Counts judgements in which "first" is the side whose rate is asked for. Raises ValueError on none."""
    seen = list(judgements)
    if not seen:
        raise ValueError("no comparison to count a win rate from")
    n, wins, losses = len(seen), seen.count("first"), seen.count("second")
    rate = (wins + 0.5 * (n - wins - losses)) / n
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return WinRate(rate, centre - half, centre + half, n, wins, losses)
