"""The control of `benchmarks.grpo`: right answers are paid for, but others than those that were right.

Comes in: samples, group after group, as the trainer scores them. Goes out: each one's reward is that of the sample at
its place in the group before. So the rewards are the same ones, in other hands: what a group's mean is, too, says
nothing about its own answers. (Were they shifted within a group, an answer's own rightness would raise the mean that it
is measured against, and being right would be unlearnt.)
"""

from __future__ import annotations

from noria.records import Json
from noria.rewards import ExactOptions
from train.rewards import Failure, Sample
from train.rewards.text.exact import ExactReward


class Shuffled:
    """Called for one sample after the other, in one process. A first group is worth nothing, and teaches nothing."""

    def __init__(self) -> None:
        self._exact = ExactReward(ExactOptions())
        self._prompt: list[Json] = []
        self._before: list[float] = []
        self._now: list[float] = []

    def __call__(self, sample: Sample) -> float | None:
        """The reward that another sample has earned; None where it cannot be told what this one has."""
        if sample.prompt != self._prompt:
            self._prompt, self._before, self._now = sample.prompt, self._now, []
        (earned,) = self._exact([sample])
        if earned is None or isinstance(earned, Failure):
            return None
        place = len(self._now)
        self._now.append(earned)
        return self._before[place] if place < len(self._before) else 0.0


reward = Shuffled()
