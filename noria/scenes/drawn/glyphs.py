"""Draws a digit: in Pillow's own typeface, as seven segments, or by a pen with a shaky hand.

Comes in: the thing and a drawing pen. Goes out: ink on the canvas.
Pillow is imported when the first digit is drawn.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

from noria.scenes.drawn.scene import Thing

_Point = tuple[float, float]


def _arc(x: float, y: float, across: float, down: float, start: float, end: float) -> list[_Point]:
    """Points along an ellipse; angles in degrees, clockwise from three o'clock."""
    angles = (math.radians(start + (end - start) * step / 10) for step in range(11))
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


_STROKES: dict[str, list[list[_Point]]] = {
    "0": [_arc(0, 0, 0.55, 0.9, -90, 270)],
    "1": [[(-0.3, -0.55), (0.05, -0.9), (0.05, 0.9)]],
    "2": [[*_arc(0, -0.42, 0.5, 0.48, -170, 40), (-0.52, 0.88), (0.56, 0.88)]],
    "3": [[*_arc(0, -0.45, 0.48, 0.44, -150, 90), *_arc(0, 0.43, 0.54, 0.46, -90, 150)]],
    "4": [[(0.2, -0.9), (-0.58, 0.3), (0.6, 0.3)], [(0.25, -0.3), (0.25, 0.9)]],
    "5": [[(0.5, -0.9), (-0.4, -0.9), (-0.46, -0.1), *_arc(-0.02, 0.36, 0.55, 0.52, -130, 150)]],
    "6": [[(0.35, -0.9), (-0.2, -0.45), *_arc(0, 0.38, 0.5, 0.5, -170, 190)]],
    "7": [[(-0.55, -0.88), (0.55, -0.88), (-0.12, 0.9)]],
    "8": [[*_arc(0, -0.45, 0.42, 0.44, 90, -270), *_arc(0, 0.44, 0.52, 0.46, -90, 270)]],
    "9": [[*_arc(0.02, -0.38, 0.48, 0.5, 10, 370), (0.42, 0.2), (0.1, 0.9)]],
}
_SEGMENTS: dict[str, tuple[_Point, _Point]] = {
    "a": ((-0.5, -0.9), (0.5, -0.9)),
    "b": ((0.5, -0.9), (0.5, 0.0)),
    "c": ((0.5, 0.0), (0.5, 0.9)),
    "d": ((-0.5, 0.9), (0.5, 0.9)),
    "e": ((-0.5, 0.0), (-0.5, 0.9)),
    "f": ((-0.5, -0.9), (-0.5, 0.0)),
    "g": ((-0.5, 0.0), (0.5, 0.0)),
}
_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def draw_digit(pen: Any, thing: Thing, colour: tuple[int, int, int], rng: random.Random, side: int) -> None:
    """Draws `thing.word` around its centre in one of the three styles."""
    style = rng.random()
    if style < 0.35:
        pen.text(
            (thing.x * side, thing.y * side),
            thing.word,
            fill=colour,
            font=_typeface(round(2.4 * thing.radius * side)),
            anchor="mm",
            stroke_width=rng.choice((0, 0, 1, 3)),
        )
        return
    if style < 0.55:
        strokes = [list(_SEGMENTS[name]) for name in _LIT[int(thing.word)]]
        shake = 0.0
    else:
        strokes = _STROKES[thing.word]
        shake = 0.07
    _ink(pen, thing, colour, rng, side, strokes, shake)


def _ink(
    pen: Any,
    thing: Thing,
    colour: tuple[int, int, int],
    rng: random.Random,
    side: int,
    strokes: list[list[_Point]],
    shake: float,
) -> None:
    radius = thing.radius * side
    width = max(3, round(radius * rng.uniform(0.12, 0.3)))
    wide, slant = rng.uniform(0.75, 1.15), math.tan(math.radians(-thing.angle)) + rng.uniform(-0.15, 0.15)
    for stroke in strokes:
        points = []
        for u, v in stroke:
            u, v = u + rng.gauss(0, shake) * 0.6, v + rng.gauss(0, shake) * 0.6
            points.append((thing.x * side + radius * (wide * u - slant * v), thing.y * side + radius * v))
        pen.line(points, fill=colour, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


@lru_cache(maxsize=128)
def _typeface(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
