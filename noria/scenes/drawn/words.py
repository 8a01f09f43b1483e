"""What a scene can hold, in words, and which combinations training never sees.

Comes in: nothing. Goes out: the vocabularies, the colours' numbers, and the held-out combinations.
Must not import Pillow or numpy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 222, 40),
    "green": (30, 150, 60),
    "blue": (40, 90, 220),
    "purple": (130, 50, 170),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
DIGITS = tuple("0123456789")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "photo")
MOST_THINGS = 3
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)


class Look(NamedTuple):
    """What a thing looks like, in words: its colour, its shape or digit, its size."""

    colour: str
    word: str
    size: str


def shape_looks(split: str, background: str) -> tuple[Look, ...]:
    """The shapes that scenes of this split hold before this background, in a fixed order."""
    return _looks(SHAPES, split, background)


def digit_looks(split: str, background: str) -> tuple[Look, ...]:
    """The digits, likewise."""
    return _looks(DIGITS, split, background)


def is_held_out(look: Look, background: str) -> bool:
    """Whether no scene of the split `train` holds this look before this background; `held_out` holds nothing else.

    For each colour, size and background one word is held out. Smaller meetings all stay in training: where a pair (red,
    square) was held out whole, what was learnt was that red is never square, the opposite of what is then asked.
    """
    words = DIGITS if look.word in DIGITS else SHAPES
    place = tuple(COLOURS).index(look.colour) + 3 * SIZES.index(look.size) + BACKGROUNDS.index(background)
    return look.word == words[(place + 1) % len(words)]


@lru_cache(maxsize=64)
def _looks(words: tuple[str, ...], split: str, background: str) -> tuple[Look, ...]:
    looks = (Look(colour, word, size) for colour in COLOURS for word in words for size in SIZES)
    return tuple(look for look in looks if is_held_out(look, background) == (split == HELD_OUT))
