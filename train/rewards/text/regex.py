"""Reward `regex`: 1 where a pattern is found, else 0.

Comes in: samples. Goes out: 0 or 1; a failure where the search takes too long. Must not import torch or `serve`.
"""

from __future__ import annotations

from collections.abc import Sequence

from noria.rewards import RegexOptions
from train.rewards.protocol import Failure, Sample, Value
from train.rewards.text.patterns import Pattern


class RegexReward:
    """Searches each text, or matches the whole of it."""

    name = "regex"

    def __init__(self, options: RegexOptions) -> None:
        self._pattern = Pattern(options.pattern, options.timeout_s)
        self._whole = options.whole

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 or 1 each."""
        found = [self._pattern.found(sample.text, whole=self._whole) for sample in samples]
        return [one if isinstance(one, Failure) else float(one) for one in found]
