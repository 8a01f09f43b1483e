"""From a model's words to something that can be compared: words, numbers, letters.

Comes in: text. Goes out: text in one spelling, a number, the letter of an option. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_TEENS = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
NUMBER_WORDS = {word: value for value, word in enumerate((*_TO_TEN, *_TEENS, "twenty"))}
_NUMBER = re.compile(r"(?<![\w.])[-\u2212+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_NOT_WORDS = re.compile(r"(?<=[^\W\d])[.]|[.](?!\d)|(?<!\S)-(?!\d)|(?<=\S)-|[^\w\s.-]|_")
_SAID = re.compile(r"\b(?i:answer|option|choice)(?:\s+is|\s*:)?\s*[:*(\[]*\s*([A-Z])\b(?!['\u2019\w])")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_MARKED = re.compile(r"(?<!\w)([A-Z])(?:[.):]|\s*$)", re.MULTILINE)


def words_of(text: str) -> list[str]:
    """The text's words in one spelling: NFKC, no case, no punctuation, no articles, no commas inside numbers.

    An apostrophe joins (`don't` is `dont`), any other mark parts; decimal points and signs of numbers stay. A text of
    articles alone keeps them.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "").replace("\u2212", "-")
    words = _NOT_WORDS.sub(" ", _BETWEEN_DIGITS.sub("", text)).split()
    return [word for word in words if word not in ARTICLES] or words


def normalised(text: str) -> str:
    """`words_of` in one line."""
    return " ".join(words_of(text))


def says(text: str, wanted: str) -> bool:
    """Whether the wanted words stand in the text as whole words, one after the other."""
    words, sought = words_of(text), words_of(wanted)
    return bool(sought) and any(words[at : at + len(sought)] == sought for at in range(len(words) - len(sought) + 1))


def number_in(text: str) -> float | None:
    """The last number that the text writes in digits, else the last in words (zero to twenty), else None."""
    text = unicodedata.normalize("NFKC", text)
    digits = [found.group() for found in _NUMBER.finditer(text) if any(letter.isdigit() for letter in found.group())]
    if digits:
        return float(digits[-1].replace(",", "").replace("\u2212", "-"))
    spelled = [word for word in re.findall(r"[a-z]+", text.casefold()) if word in NUMBER_WORDS]
    return float(NUMBER_WORDS[spelled[-1]]) if spelled else None


def letter_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that the answer chooses, or None; nothing is guessed.

    In order: a bare letter; "the answer is B"; the last "(B)"; the last "B." or "B:" or B at a line's end; the one
    option whose words are the answer; the only option that the answer says.
    """
    letters = [chr(ord("A") + number) for number in range(len(options))]
    bare = text.strip().strip("().[]:*").strip()
    if bare.upper() in letters and len(bare) == 1:
        return bare.upper()
    for pattern in (_SAID, _BRACKETED, _MARKED):
        found = [letter for letter in pattern.findall(text) if letter in letters]
        if found:
            return str(found[-1])
    same = [letter for letter, option in zip(letters, options, strict=True) if normalised(option) == normalised(text)]
    said = same or [letter for letter, option in zip(letters, options, strict=True) if says(text, option)]
    return said[0] if len(said) == 1 else None


def yes_or_no(text: str) -> str | None:
    """`yes` or `no` when one stands in the answer's first four characters, as MME's own script looks for it."""
    head = text.strip().lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else None


_VQA_MARKS = ';/[]"{}()=+\\_-><@`!'
_VQA_NUMBERS = {word: str(value) for word, value in NUMBER_WORDS.items() if value <= 10} | {"none": "0"}


def vqa_words(text: str) -> str:
    """An answer as VQA's accuracy compares it: no case, no punctuation, no articles, zero to ten in digits.

    Commas and question marks are dropped and a final 's stands apart; any other mark is dropped where it touches a
    space anywhere in the text, else it parts its words; a full stop stays before a digit only. The published rule
    spells contractions out of a list (dont is don't); here apostrophes are dropped on both sides, which makes the same
    pairs equal. Antol et al. 2015, https://arxiv.org/abs/1505.00468, section 3, and its evaluation code.
    """
    said = re.sub(r"[\n\t]", " ", text.lower().replace("\u2019", "'")).strip()
    said = said.replace(",", "").replace("?", "").replace("'s", " 's")
    left = said
    for mark in _VQA_MARKS:
        touches = f"{mark} " in said or f" {mark}" in said
        left = left.replace(mark, "" if touches else " ")
    words = re.sub(r"\.(?!\d)", "", left).replace("'", "").split()
    return " ".join(_VQA_NUMBERS.get(word, word) for word in words if word not in ARTICLES)
