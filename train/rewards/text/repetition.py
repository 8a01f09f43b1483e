"""Reward `repetition`: 1 for a text that says nothing twice.

Comes in: samples. Goes out: 0 to 1. Must not import torch or `serve`.

rep-n = 1 - |distinct n-grams| / |n-grams|, seq-rep-n of Welleck et al. 2019, https://arxiv.org/abs/1908.04319,
section 6. The reward is 1 - max(0, rep-n - a) / (1 - a), with `a` the share that is allowed; a text of fewer than n
units has repeated nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from noria.rewards import RepetitionOptions
from train.rewards.protocol import Sample, Value

_WORD = re.compile(r"\w+")


class RepetitionReward:
    """Counts n-grams of words (runs of letters and digits, without regard to case) or of characters."""

    name = "repetition"

    def __init__(self, options: RepetitionOptions) -> None:
        self._options = options

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        allowed = self._options.allowed
        return [1.0 - max(0.0, self._repeated(one.text) - allowed) / (1.0 - allowed) for one in samples]

    def _repeated(self, text: str) -> float:
        text = text.casefold()
        units: Sequence[str] = _WORD.findall(text) if self._options.unit == "words" else "".join(text.split())
        return repeated_share(units, self._options.n)


def repeated_share(units: Sequence[str], n: int) -> float:
    """rep-n: the share of n-grams that stood before; 0 where there are none."""
    grams = [tuple(units[at : at + n]) for at in range(len(units) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
