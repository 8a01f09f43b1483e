"""What a set's scores come to, and how two versions compare on the same questions.

Comes in: one score a question. Goes out: means with 95 % Wilson intervals, in all and by category, as plain JSON; the
paired comparison of two results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from noria.evals.questions import Question
from noria.records import Json

Z95 = 1.959964
PERCEPTION = frozenset(
    {"existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr"}
)
COGNITION = frozenset({"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"})


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate over n questions (Wilson 1927, JASA 22:209-212).

    For scores between 0 and 1 it is wider than need be: a mean of p varies at most as much as a share of p.
    """
    if not n:
        return 0.0, 1.0
    z = Z95
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(rate * (1 - rate), 0.0) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate_of(scores: Iterable[float]) -> Json:
    """`{"score", "low", "high", "n"}` of some scores. An empty list has score 0 and the interval [0, 1]."""
    seen = list(scores)
    mean = math.fsum(seen) / len(seen) if seen else 0.0
    low, high = wilson(mean, len(seen))
    return {"score": mean, "low": low, "high": high, "n": len(seen)}


def summarise(questions: Sequence[Question], scores: Sequence[float]) -> Json:
    """The whole set's rate, `metrics` used, and the rate of each category under `categories`.

    Where questions come in groups, each rate has `all_right`: the share of groups with every question right (MME's
    accuracy+). MME's categories also get its points, 100 (accuracy + accuracy+), and the sums of its two halves
    (Fu et al. 2023, https://arxiv.org/abs/2306.13394, section 2.2).
    """
    pairs = list(zip(questions, scores, strict=True))
    names = sorted({question.category for question in questions} - {""})
    of = {name: _rate([pair for pair in pairs if pair[0].category == name]) for name in names}
    whole = {**_rate(pairs), "metrics": sorted({question.metric for question in questions})}
    return {**whole, "categories": of, **_mme_points(of)}


def _rate(pairs: Sequence[tuple[Question, float]]) -> Json:
    rate = rate_of(score for _, score in pairs)
    groups: dict[str, bool] = {}
    for question, score in pairs:
        if question.group is not None:
            groups[question.group] = groups.get(question.group, True) and score >= 1.0
    return {**rate, "all_right": rate_of(map(float, groups.values()))} if groups else rate


def _mme_points(categories: Json) -> Json:
    known = {name: one for name, one in categories.items() if name.lower() in PERCEPTION | COGNITION}
    if not known or len(known) != len(categories) or not all("all_right" in one for one in known.values()):
        return {}
    points = {name: 100 * (one["score"] + one["all_right"]["score"]) for name, one in known.items()}
    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    sums = {half: sum(p for name, p in points.items() if name.lower() in of) for half, of in halves.items()}
    return {"mme": {**sums, "points": points}}


@dataclass(frozen=True)
class Paired:
    """Questions on which the first result was better or worse than the second, and the sign test's p-value.

    `p` is two-sided and exact: how often a fair coin would part so unevenly (ties are left out).
    """

    better: int
    worse: int
    same: int
    p: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares two results question by question. Raises ValueError when they differ in length."""
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    better, worse = sum(gap > 1e-9 for gap in gaps), sum(gap < -1e-9 for gap in gaps)
    n, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n if n else 1.0
    return Paired(better, worse, len(gaps) - n, min(1.0, 2 * tail))
