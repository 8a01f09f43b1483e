"""Draws a scene.

Comes in: a `Scene`. Goes out: a 96x96 RGB picture, the same for the same scene.
Shapes are drawn at twice the size and shrunk, which smooths their edges; noise comes last.
Pillow and numpy are imported when the first picture is drawn.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from noria.scenes.drawn.glyphs import draw_digit
from noria.scenes.drawn.scene import Scene, Thing
from noria.scenes.drawn.words import COLOURS

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIDE = 96
_OVER = 2  # drawn this much larger, then shrunk
_MAX_NOISE = 12.0  # standard deviation, of 255
_HEART = tuple(
    (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08)
    for t in (2 * math.pi * step / 28 for step in range(28))
)
_STAR = tuple(
    (length * math.sin(math.pi * k / 5), -length * math.cos(math.pi * k / 5))
    for k, length in enumerate((1.0, 0.42) * 5)
)
_TRIANGLE = tuple((math.sin(2 * math.pi * k / 3), -math.cos(2 * math.pi * k / 3)) for k in range(3))
_SQUARE = ((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78))
_ARM = 0.3
_CROSS = (
    (-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM),
    (_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM),
)  # fmt: skip
_OUTLINES = {"heart": _HEART, "star": _STAR, "triangle": _TRIANGLE, "square": _SQUARE, "cross": _CROSS}


def draw_scene(scene: Scene) -> Image.Image:
    """The scene's picture, 96x96 RGB."""
    from PIL import ImageDraw

    rng = random.Random(scene.seed)  # noqa: S311
    canvas = _background(scene.background, rng)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        colour = _shade(COLOURS[thing.colour], rng, 16)
        if scene.kind == "digit":
            draw_digit(pen, thing, colour, rng, canvas.width)
        else:
            _draw_shape(pen, thing, colour, canvas.width)
    return _noisy(canvas.reduce(_OVER), rng.getrandbits(32), rng.uniform(0, _MAX_NOISE))


def _draw_shape(pen: Any, thing: Thing, colour: tuple[int, int, int], side: int) -> None:
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    if thing.word == "circle":
        radius *= 0.9
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    pen.polygon(
        [(x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)) for u, v in _OUTLINES[thing.word]],
        fill=colour,
    )


def _background(kind: str, rng: random.Random) -> Image.Image:
    """A muted ground: no colour of a thing comes near it."""
    from PIL import Image, ImageDraw

    side = SIDE * _OVER
    tone, other = _tone(rng), _tone(rng)
    if kind == "photo":
        from noria.scenes.photos import texture

        return texture(rng, side)
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
        return Image.composite(Image.new("RGB", (side, side), tone), Image.new("RGB", (side, side), other), ramp)
    canvas = Image.new("RGB", (side, side), tone)
    if kind == "plain":
        return canvas
    pen = ImageDraw.Draw(canvas)
    near = tuple(round(a + 0.5 * (b - a)) for a, b in zip(tone, other, strict=True))
    step = rng.randrange(14, 40)
    if kind == "stripes":
        slant = rng.randrange(-side, side)
        for x in range(-side, 2 * side, 2 * step):
            pen.line((x, 0, x + slant, side), fill=near, width=step)
        return canvas
    for row in range(0, side, step):
        for column in range((row // step % 2) * step, side, 2 * step):
            pen.rectangle((column, row, column + step - 1, row + step - 1), fill=near)
    return canvas


def _tone(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.randrange(85, 180)
    return (grey + rng.randrange(-14, 15), grey + rng.randrange(-14, 15), grey + rng.randrange(-14, 15))


def _shade(colour: tuple[int, int, int], rng: random.Random, spread: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, part + rng.randrange(-spread, spread + 1))) for part in colour)
    return red, green, blue


def _noisy(picture: Image.Image, seed: int, deviation: float) -> Image.Image:
    import numpy as np
    from PIL import Image

    rng = np.random.Generator(np.random.PCG64(seed))
    picks = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    noise = (_bell() * deviation).astype(np.int16)[picks]
    values = np.clip(np.asarray(picture, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(values)


@lru_cache(maxsize=1)
def _bell() -> np.ndarray[Any, np.dtype[np.float64]]:
    """The normal distribution's quantiles at 256 even steps: a table lookup costs a tenth of drawing normals."""
    from statistics import NormalDist

    import numpy as np

    normal = NormalDist()
    return np.array([normal.inv_cdf((step + 0.5) / 256) for step in range(256)])
