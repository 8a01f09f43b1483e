"""Several rewards with weights as one: totals, parts, and failures counted by reward and reason.

Comes in: rewards, samples. Goes out: `Scores`; TrainingError `reward_failed` when a reward fails too often.
Must not import torch or `serve`.

total = sum over rewards of weight * value. A sample that one of them could not judge has no total: it is not trained
on. A reward's failures are counted over its last `window` samples, and measured against the whole window also before
so many were judged: a job is not stopped by one unlucky sample at its start, and a reward that never works stops it
after `max_failure_rate * window` samples, however many went well an hour ago.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import TracebackType
from typing import Self

from noria.errors import NoriaError, SettingsError, TrainingError
from noria.records import Json
from train.rewards.protocol import UNJUDGED, Failure, Reward, Sample, Value

MAX_FAILURE_RATE = 0.1
FAILURE_WINDOW = 200
CHUNK = 32  # samples between two looks at the bound: a reward that hangs on each is not waited for a whole batch long


@dataclass(frozen=True)
class Weighted:
    """A reward with its weight, and the name under which it is shown (none: its own)."""

    reward: Reward
    weight: float = 1.0
    label: str | None = None

    @property
    def key(self) -> str:
        """The name under which it is shown."""
        return self.label or self.reward.name


@dataclass(frozen=True)
class Scores:
    """What some samples are worth, in their order.

    `totals` has None for a sample without one; `parts` are the values by reward; `failed` says for each sample which
    rewards could not judge it, and why.
    """

    totals: list[float | None]
    parts: dict[str, list[float | None]]
    failed: list[dict[str, str]]


@dataclass
class _Tally:
    """One reward's samples so far. `recent` is 1 for a failure, of the last samples only."""

    recent: deque[int]
    judged: int = 0
    value: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


class Scorer:
    """Scores samples; close it, or use it as a context manager, to end what rewards hold. For one thread at a time."""

    def __init__(
        self,
        rewards: Sequence[Weighted],
        *,
        max_failure_rate: float = MAX_FAILURE_RATE,
        window: int = FAILURE_WINDOW,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        keys = [one.key for one in rewards]
        if not keys or len(set(keys)) < len(keys):
            raise SettingsError(f"a scorer needs rewards with names that differ, not {keys}", param="rewards")
        self.rewards = tuple(rewards)
        self._max_failures = max_failure_rate * window
        self._window = window
        self._check = check
        self._tallies = {key: _Tally(deque(maxlen=window)) for key in keys}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores them. Raises TrainingError `reward_failed`, and what a reward raises on purpose (NoriaError)."""
        found: dict[str, list[float | Failure]] = {one.key: [] for one in self.rewards}
        for start in range(0, len(samples), CHUNK):
            for one in self.rewards:
                self._check()
                values = _judged(one.reward, samples[start : start + CHUNK])
                self._count(one.key, values)
                self._require_few_failures(one.key)
                found[one.key] += values
        return Scores(
            totals=[self._total({key: values[at] for key, values in found.items()}) for at in range(len(samples))],
            parts={key: [None if isinstance(v, Failure) else v for v in values] for key, values in found.items()},
            failed=[
                {key: v.reason for key, values in found.items() if isinstance(v := values[at], Failure)}
                for at in range(len(samples))
            ],
        )

    @property
    def counts(self) -> Json:
        """By reward, since the start: `{"samples", "mean", "failed", "reasons": {reason: count}}`.

        A reward that was learnt says how well, under `figures`.
        """
        return {one.key: self._told(one) for one in self.rewards}

    def _told(self, one: Weighted) -> Json:
        tally, figures = self._tallies[one.key], getattr(one.reward, "figures", None)
        told = {
            "samples": tally.judged + tally.reasons.total(),
            "mean": tally.value / tally.judged if tally.judged else None,
            "failed": tally.reasons.total(),
            "reasons": dict(sorted(tally.reasons.items())),
        }
        return told if figures is None else {**told, "figures": figures}

    def close(self) -> None:
        """Ends processes and connections that rewards hold."""
        close_all(one.reward for one in self.rewards)

    def _total(self, values: dict[str, float | Failure]) -> float | None:
        total = 0.0
        for one in self.rewards:
            value = values[one.key]
            if one.weight == 0:
                continue  # shown only: it costs nothing that it could not judge
            if isinstance(value, Failure):
                return None
            total += one.weight * value
        return total

    def _count(self, key: str, values: Iterable[float | Failure]) -> None:
        tally = self._tallies[key]
        for value in values:
            failed = isinstance(value, Failure)
            tally.recent.append(int(failed))
            if isinstance(value, Failure):
                tally.reasons[value.reason] += 1
            else:
                tally.judged += 1
                tally.value += value

    def _require_few_failures(self, key: str) -> None:
        tally = self._tallies[key]
        failures = sum(tally.recent)
        if failures > self._max_failures:
            why = ", ".join(f"{count} {reason}" for reason, count in tally.reasons.most_common())
            raise TrainingError(
                f"reward {key!r} could not judge {failures} of the last {len(tally.recent)} samples; more than "
                f"{self._max_failures:g} of {self._window} end the job (max_failure_rate, failure_window). Since the "
                f"start: {why}",
                param="max_failure_rate",
                code="reward_failed",
            )


def combine(
    rewards: Sequence[Weighted | Reward],
    *,
    max_failure_rate: float = MAX_FAILURE_RATE,
    window: int = FAILURE_WINDOW,
    check: Callable[[], None] = lambda: None,
) -> Scorer:
    """One scorer over all; a reward without a weight has 1. Raises SettingsError where two have one name.

    `check` is called between batches of samples and may raise to stop.
    """
    weighted = [one if isinstance(one, Weighted) else Weighted(one) for one in rewards]
    return Scorer(weighted, max_failure_rate=max_failure_rate, window=window, check=check)


def close_all(rewards: Iterable[Reward]) -> None:
    """Closes what can be closed."""
    for reward in rewards:
        close = getattr(reward, "close", None)
        if close is not None:
            close()


def _judged(reward: Reward, samples: Sequence[Sample]) -> list[float | Failure]:
    """One value a sample. What raises over all of them is asked again for each alone, so that it costs that sample."""
    if not samples:
        return []
    try:
        values = list(reward(samples))
    except NoriaError:
        raise
    except Exception as error:  # noqa: BLE001 - a reward is a plug-in; what it raises is counted by its kind
        if len(samples) == 1:
            return [Failure(f"raised {type(error).__name__}")]
        return [value for sample in samples for value in _judged(reward, [sample])]
    if len(values) != len(samples):
        return [Failure("wrong number of values")] * len(samples)
    return [_checked(value) for value in values]


def _checked(value: Value) -> float | Failure:
    if value is None:
        return UNJUDGED
    if isinstance(value, Failure):
        return value
    if not isinstance(value, Real):
        return Failure(f"returned {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        return Failure("not finite")
    return number if math.isfinite(number) else Failure("not finite")
