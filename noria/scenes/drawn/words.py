"""What a scene can hold, in words, and which combinations training never sees.

Comes in: nothing. Goes out: the vocabularies, the colours' numbers, and the held-out combinations.
Must not import Pillow or numpy.
"""

from __future__ import annotations

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


def _pairs(words: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Each word with one or two of the colours, so that every colour and every word stays in training."""
    colours = tuple(COLOURS)
    count = max(len(words), len(colours))
    return frozenset((colours[index % len(colours)], words[(7 * index + 1) % len(words)]) for index in range(count))


HELD_OUT_SHAPES = _pairs(SHAPES)
"""(colour, shape) that no scene of the split `train` holds; scenes of `held_out` hold nothing else."""
HELD_OUT_DIGITS = _pairs(tuple(reversed(DIGITS)))
"""(colour, digit), likewise."""


def shape_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs of one split, in a fixed order."""
    return _split(SHAPES, HELD_OUT_SHAPES, split)


def digit_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (colour, digit) pairs of one split, in a fixed order."""
    return _split(DIGITS, HELD_OUT_DIGITS, split)


def _split(words: tuple[str, ...], held_out: frozenset[tuple[str, str]], split: str) -> tuple[tuple[str, str], ...]:
    wanted = split == HELD_OUT
    return tuple((colour, word) for colour in COLOURS for word in words if ((colour, word) in held_out) == wanted)
