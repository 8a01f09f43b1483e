"""Regular expressions with a time limit: a pattern that backtracks without end costs one sample, not the job.

Comes in: a pattern in Python's syntax. Goes out: the last match in a text. The package `regex` reads Python's own
syntax (its version 0) and, unlike `re`, takes a time limit.
"""

from __future__ import annotations

from typing import Any

import regex

from noria.errors import SettingsError
from train.rewards.protocol import Failure

TIMEOUT = Failure("timeout")


class Pattern:
    """A compiled pattern and the longest search with it, in seconds. Raises SettingsError where it does not compile."""

    def __init__(self, pattern: str, timeout_s: float) -> None:
        try:
            self._compiled = regex.compile(pattern, regex.VERSION0)
        except regex.error as error:
            raise SettingsError(f"not a regular expression: {error}", param="pattern") from error
        self._timeout_s = timeout_s

    def found(self, text: str, *, whole: bool = False) -> bool | Failure:
        """Whether it matches somewhere in the text, or all of it (`whole`)."""
        search = self._compiled.fullmatch if whole else self._compiled.search
        try:
            return search(text, timeout=self._timeout_s) is not None
        except TimeoutError:
            return TIMEOUT

    def last(self, text: str) -> str | Failure | None:
        """The first group of the last match, or all of the match where the pattern has no group."""
        try:
            match: Any = None
            for match in self._compiled.finditer(text, timeout=self._timeout_s):  # noqa: B007 - the last one counts
                pass
        except TimeoutError:
            return TIMEOUT
        if match is None:
            return None
        said = match.group(1 if self._compiled.groups else 0)
        return str(said) if said is not None else None
