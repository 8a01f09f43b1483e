"""Reward `language`: whether a text is in a wanted language.

Comes in: samples. Goes out: 0 or 1, or a probability. Must not import torch or `serve`.

py3langid (BSD, 5 MB, numpy alone, 139 languages, no network) is langid.py kept alive: naive Bayes over byte n-grams
(Lui and Baldwin 2012, https://aclanthology.org/P12-3005). The same text always gets the same answer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from noria.errors import SettingsError
from noria.rewards import LanguageOptions
from train.rewards.protocol import Sample, Value


class LanguageReward:
    """Tells languages apart. Raises SettingsError: the package is missing, a code is unknown or not told apart."""

    name = "language"

    def __init__(self, options: LanguageOptions) -> None:
        self._options = options
        self._wanted = frozenset(options.languages)
        self._identify = _identifier()
        known = set(self._identify.labels)
        among = options.among or tuple({code for code in known if len(code) == 2} | self._wanted)
        unknown = sorted((self._wanted | set(among)) - known)
        if unknown:
            told = f"language {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}"
            raise SettingsError(told, param="languages")
        missing = sorted(self._wanted - set(among))
        if missing:
            raise SettingsError(f"language {missing[0]!r} is wanted but not in `among`", param="among")
        self._identify.set_languages(among)

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        return [self._one(sample.text) for sample in samples]

    def _one(self, text: str) -> float:
        letters = "".join(letter for letter in text if letter.isalpha())
        if len(letters.encode(errors="replace")) < self._options.min_letter_bytes:
            return self._options.short
        ranked: list[tuple[str, float]] = self._identify.rank(text)
        if self._options.graded:
            return min(1.0, sum(share for code, share in ranked if code in self._wanted))
        return float(ranked[0][0] in self._wanted)


def _identifier() -> Any:
    """A fresh identifier that gives probabilities. Raises SettingsError where the package is missing."""
    try:
        langid = importlib.import_module("py3langid.langid")
    except ImportError as error:
        raise SettingsError(
            "reward language needs the package py3langid: pip install 'noria[model]', or 'py3langid>=0.4,<0.5'",
            param="language",
        ) from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
