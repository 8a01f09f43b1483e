"""What a scene can hold, in words, and which combinations training never sees.

Comes in: nothing. Goes out: the vocabularies, the colours' numbers, and the held-out combinations.
Must not import Pillow or numpy.
"""

from __future__ import annotations

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


def _held_out(words: tuple[str, ...]) -> frozenset[Look]:
    """One word for each colour and size. Pairs of words all stay in training: only their meeting is new.

    A pair held out whole would teach the opposite of what is asked: that this colour never has this shape.
    """
    return frozenset(
        Look(colour, words[(number + 3 * place + 1) % len(words)], size)
        for number, colour in enumerate(COLOURS)
        for place, size in enumerate(SIZES)
    )


HELD_OUT_SHAPES = _held_out(SHAPES)
"""(colour, shape, size) that no scene of the split `train` holds; scenes of `held_out` hold nothing else."""
HELD_OUT_DIGITS = _held_out(DIGITS)
"""(colour, digit, size), likewise."""


def shape_looks(split: str) -> tuple[Look, ...]:
    """The shapes of one split, in a fixed order."""
    return _split(SHAPES, HELD_OUT_SHAPES, split)


def digit_looks(split: str) -> tuple[Look, ...]:
    """The digits of one split, in a fixed order."""
    return _split(DIGITS, HELD_OUT_DIGITS, split)


def _split(words: tuple[str, ...], held_out: frozenset[Look], split: str) -> tuple[Look, ...]:
    wanted = split == HELD_OUT
    looks = (Look(colour, word, size) for colour in COLOURS for word in words for size in SIZES)
    return tuple(look for look in looks if (look in held_out) == wanted)
