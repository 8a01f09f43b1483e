"""Reward `length`: 1 within a band, falling linearly to 0 outside it.

Comes in: samples, and a tokenizer where tokens are counted that the sampler did not. Goes out: 0 to 1.
Must not import torch or `serve`.

With length l, band [low, high] and fall-off w: 1 - min(1, d / w), where d = max(low - l, l - high, 0) is the distance
from the band; w = 0 is a sharp edge. The upper side is DAPO's soft overlong punishment, moved to [0, 1] (Yu et al.
2025, https://arxiv.org/abs/2503.14476, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from noria.errors import TrainingError
from noria.rewards import LengthOptions
from train.rewards.protocol import Backing, Sample, Value


class LengthReward:
    """Counts tokens or characters (code points). Raises TrainingError when it is asked for tokens and has no way."""

    name = "length"

    def __init__(self, options: LengthOptions, backing: Backing) -> None:
        self._options = options
        self._backing = backing
        self._tokenizer: Any = None

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        return [banded(self._length(one), self._options) for one in samples]

    def _length(self, sample: Sample) -> int:
        if self._options.unit == "characters":
            return len(sample.text)
        if sample.tokens is not None:
            return sample.tokens
        if self._tokenizer is None:
            if self._backing.processor is None:
                raise TrainingError(
                    "reward length counts tokens, but these samples do not say how many there are and no model's "
                    'tokenizer is at hand: name a model, or say unit = "characters"',
                    param="unit",
                    code="no_tokenizer",
                )
            processor = self._backing.processor()
            self._tokenizer = getattr(processor, "tokenizer", processor)
        return len(self._tokenizer(sample.text, add_special_tokens=False)["input_ids"])


def banded(length: int, options: LengthOptions) -> float:
    """What a length is worth."""
    outside = max(options.low - length, length - options.high, 0)
    return 1.0 - min(1.0, outside / options.falloff) if options.falloff else float(outside == 0)
