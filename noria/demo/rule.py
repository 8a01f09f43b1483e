"""The demo's annotator, a stated rule, and the win rate that it gives one version over another.

The rule: an answer that is right beats one that is not; of two right ones the clearly shorter wins; lengths less than
a tenth apart are a tie; if neither is right, both are bad. What is right, the question knows: about a picture, what it
truly shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from noria.evals.metrics import score
from noria.evals.questions import Question
from noria.evals.scores import wilson

Judgement = Literal["first", "second", "tie", "both_bad"]

CLEARLY = 0.9  # of the other's length: a few letters more or less are chance, and would teach it


def judge(question: Question, first: str, second: str) -> Judgement:
    """Applies the rule to two answers of one question."""
    right_first, right_second = (is_right(question, answer) for answer in (first, second))
    if not (right_first or right_second):
        return "both_bad"
    if right_first != right_second:
        return "first" if right_first else "second"
    length_first, length_second = len(first.strip()), len(second.strip())
    if length_first <= CLEARLY * length_second:
        return "first"
    return "second" if length_second <= CLEARLY * length_first else "tie"


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer says what is true, and of a few words to choose from no other."""
    return score(question, answer) == 1.0


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that the first side won, a tie or both bad counting half.

    `low` and `high` are the 95 % Wilson score interval at this rate and `n`.
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
    low, high = wilson(rate, n)
    return WinRate(rate, low, high, n, wins, losses)
