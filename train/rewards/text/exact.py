"""Reward `exact`: how right an answer is, by the metrics of `noria eval`.

Comes in: samples with right answers. Goes out: 0 to 1; a failure where the row says no right answer, or one that its
metric cannot read. Must not import torch or `serve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from noria.evals.metrics import score
from noria.evals.normalise import number_in
from noria.evals.questions import METRICS, Metric, Question
from noria.evals.readers.jsonl import letter_for
from noria.evals.readers.rows import RowError, texts_of
from noria.rewards import ExactOptions
from train.rewards.protocol import Failure, Sample, Value
from train.rewards.text.patterns import Pattern

NO_ANSWER = Failure("no right answer")
BAD_ANSWER = Failure("unreadable right answer")
BAD_OPTIONS = Failure("unreadable options")
BAD_METRIC = Failure("unknown metric")


class ExactReward:
    """The options' metric, or the row's own, over the whole text or what `extract` finds in it."""

    name = "exact"

    def __init__(self, options: ExactOptions) -> None:
        self._options = options
        self._extract = Pattern(options.extract, options.timeout_s) if options.extract is not None else None

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Value:
        try:
            question = self._question(sample)
        except RowError:
            return BAD_OPTIONS
        if isinstance(question, Failure):
            return question
        said: str | Failure | None = sample.text if self._extract is None else self._extract.last(sample.text)
        if isinstance(said, Failure):
            return said
        return score(question, said) if said is not None else 0.0

    def _question(self, sample: Sample) -> Question | Failure:
        """The prompt's row as an evaluation would ask it. Raises RowError for options that are none."""
        if not sample.answers:
            return NO_ANSWER
        told = sample.extra.get("options")
        options = texts_of(told, "options") if told not in (None, []) else ()
        metric = self._options.metric or sample.extra.get("metric") or ("choice" if options else "exact")
        if metric not in METRICS:
            return BAD_METRIC
        answers = _read(sample.answers, metric, options)
        tolerance = self._tolerance(sample)
        if not answers or tolerance is None:
            return BAD_ANSWER
        return Question("", "", answers, cast(Metric, metric), options=options, tolerance=tolerance)

    def _tolerance(self, sample: Sample) -> float | None:
        stated = self._options.tolerance
        value = stated if stated is not None else sample.extra.get("tolerance") or 0.0
        return float(value) if isinstance(value, int | float) and value >= 0 else None


def _read(answers: tuple[str, ...], metric: str, options: Sequence[str]) -> tuple[str, ...]:
    """The right answers as the metric wants them; none where it cannot read one."""
    if metric == "choice":
        try:
            return tuple(letter_for(one, options) for one in answers)
        except RowError:
            return ()
    if metric == "number":
        return answers if all(number_in(one) is not None for one in answers) else ()
    if metric == "yes_no":
        lower = tuple(one.strip().lower() for one in answers)
        return lower if set(lower) <= {"yes", "no"} else ()
    return answers
