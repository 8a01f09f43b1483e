"""Finds e-mail addresses, phone numbers, card numbers and keys in text, by Microsoft Presidio's recognisers.

Comes in: text. Goes out: the same with `<EMAIL>`, `<PHONE>`, `<CARD>`, `<KEY>` in their places, and how many of each.
Presidio is an optional extra and slow to import: it is imported when a `Redactor` is made. Must not import vllm.

Its recognisers of patterns are asked directly, without an analyser: that would want a language model of spaCy's. They
see windows around what can match at all (an @, some digits) and not the whole text: their patterns take quadratic time
on hostile text, and phone numbers are slow to look for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from noria.errors import SettingsError
from noria.settings import PrivacySettings

if TYPE_CHECKING:
    from noria.settings.privacy import RedactKind

Span = tuple[int, int]
Find = Callable[[str], Iterable[Span]]
ORDER: Final[tuple[RedactKind, ...]] = ("key", "email", "card", "phone")  # of two that overlap the first one counts
_AT = re.compile("@")
_DIGITS = re.compile(r"[\d+(][\d\s().+\-/\u2010-\u2015]{5,48}")
_FEWEST_DIGITS = 7
_EMAIL_REACH, _DIGITS_REACH, _WINDOW = 320, 24, 1024  # characters; RFC 5321 allows an address 64 + 1 + 255
KEYS: Final[tuple[tuple[str, str], ...]] = (
    ("OpenAI, Anthropic, Stripe", r"\b(?:sk|rk|pk)[-_](?=[A-Za-z_\-]{0,64}[0-9])[A-Za-z0-9_\-]{16,256}"),
    ("Noria", r"\bnoria-[0-9a-f]{8,64}-[0-9a-f]{32,128}\b"),
    ("AWS", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("GitHub", r"\b(?:gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_[A-Za-z0-9_]{22,255})"),
    ("GitLab, npm, Hugging Face", r"\b(?:glpat-[A-Za-z0-9_\-]{20,255}|npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{20,255})"),
    ("Slack", r"\bxox[abeoprs]-[A-Za-z0-9\-]{10,255}"),
    ("Google", r"\bAIza[0-9A-Za-z_\-]{35}"),
    ("JSON Web Token", r"\beyJ[A-Za-z0-9_\-]{8,2048}\.eyJ[A-Za-z0-9_\-]{8,4096}\.[A-Za-z0-9_\-]{8,1024}"),
    ("bearer", r"(?i:\bbearer[ \t]{1,4})[A-Za-z0-9._~+/\-]{16,1024}"),
    ("PEM", r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]{1,8192}?-----END [A-Z ]{0,40}PRIVATE KEY-----"),
)


class Redactor:
    """Replaces what it was asked to find. Safe from several threads."""

    def __init__(self, kinds: Sequence[RedactKind], phone_regions: Sequence[str] = ("US",)) -> None:
        """Raises SettingsError when the extra is not installed, or does not know one of the regions."""
        finders = _finders(phone_regions)
        self._finders = [(kind, finders[kind]) for kind in ORDER if kind in kinds]

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text without them, and how many there were of each kind."""
        taken: list[tuple[int, int, RedactKind]] = []
        covered = bytearray(len(text))
        for kind, find in self._finders:
            for start, end in sorted(set(find(text))):
                if not any(covered[start:end]):
                    covered[start:end] = b"\1" * (end - start)
                    taken.append((start, end, kind))
        pieces, at = [], 0
        for start, end, kind in sorted(taken):
            pieces += [text[at:start], f"<{kind.upper()}>"]
            at = end
        return "".join([*pieces, text[at:]]), Counter(kind for _, _, kind in taken)


def redactor_of(settings: PrivacySettings) -> Redactor | None:
    """What `privacy.redact` asks for; None where it asks for nothing. Raises SettingsError."""
    return Redactor(settings.redact, settings.phone_regions) if settings.redact else None


def _finders(phone_regions: Sequence[str]) -> dict[RedactKind, Find]:
    try:
        import phonenumbers
        from presidio_analyzer import Pattern, PatternRecognizer
        from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, EmailRecognizer, PhoneRecognizer
    except ImportError as error:
        raise SettingsError(
            f"privacy.redact needs Microsoft Presidio, which cannot be imported here ({error}): "
            "pip install 'noria[privacy]', or leave privacy.redact empty",
            param="privacy.redact",
        ) from error
    unknown = sorted(set(phone_regions) - set(phonenumbers.SUPPORTED_REGIONS))
    if unknown:
        raise SettingsError(
            f"privacy.phone_regions: no country is called {unknown[0]!r}", param="privacy.phone_regions"
        )
    keys = [Pattern(name, pattern, 1.0) for name, pattern in KEYS]
    return {
        "key": _asking(PatternRecognizer("KEY", patterns=keys)),
        # The pattern alone decides: the recogniser's own check asks for a public domain, and fetches a list of them.
        "email": _windowed(_asking(PatternRecognizer("EMAIL", patterns=EmailRecognizer.PATTERNS)), _around_at),
        "card": _windowed(_asking(CreditCardRecognizer()), _around_digits),
        "phone": _windowed(_asking(PhoneRecognizer(supported_regions=tuple(phone_regions))), _around_digits),
    }


def _asking(recogniser: Any) -> Find:
    def find(text: str) -> Iterator[Span]:
        for found in recogniser.analyze(text, recogniser.supported_entities, None):
            yield int(found.start), int(found.end)

    return find


def _windowed(find: Find, windows: Callable[[str], Iterable[Span]]) -> Find:
    """Looks in pieces of at most `_WINDOW` characters, which overlap by what one match may span."""

    def look(text: str) -> Iterator[Span]:
        for first, last in windows(text):
            for start in range(first, last, _WINDOW - _EMAIL_REACH):
                for begin, end in find(text[start : min(last, start + _WINDOW)]):
                    yield start + begin, start + end
                if start + _WINDOW >= last:
                    break

    return look


def _around_at(text: str) -> Iterator[Span]:
    return _merged(text, (match.span() for match in _AT.finditer(text)), _EMAIL_REACH)


def _around_digits(text: str) -> Iterator[Span]:
    """Around runs of digits and of what stands between them in numbers."""
    runs = _merged(text, (match.span() for match in _DIGITS.finditer(text)), _DIGITS_REACH)
    return (run for run in runs if sum(map(str.isdigit, text[slice(*run)])) >= _FEWEST_DIGITS)


def _merged(text: str, spans: Iterable[Span], reach: int) -> Iterator[Span]:
    """The spans, each longer by `reach` on both sides, those that touch made one."""
    first = last = -1
    for start, end in spans:
        start, end = max(0, start - reach), min(len(text), end + reach)
        if last < 0:
            first, last = start, end
        elif start <= last:
            last = end
        else:
            yield first, last
            first, last = start, end
    if last >= 0:
        yield first, last
