"""Digits that people wrote: scikit-learn's copy of the UCI test set, 1797 pictures of 8x8.

Comes in: a reference `digit:SPLIT/SEED/INDEX`. Goes out: that digit, 96x96 RGB, in a look that the reference decides.
The last 397 rows are `held_out`; the file and its licence are in `data/` (`data/NOTICE.md`).
Pillow is imported when the first picture is opened.
"""

from __future__ import annotations

import gzip
import random
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

from noria.errors import InvalidRequest
from noria.scenes.drawn.words import HELD_OUT, SPLITS, TRAIN

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "digit:"
TRAIN_ROWS = 1400
SIDE = 96
_PIXELS, _LEVELS = 8, 16


def digit_ref(split: str, seed: int, index: int) -> str:
    """The reference of one written digit; an index beyond the split's rows begins again with another look."""
    return f"{PREFIX}{split}/{seed}/{index}"


def read_digit(ref: str) -> str:
    """The digit that a reference stands for. Raises InvalidRequest for a malformed one."""
    return str(_row(ref)[-1])


def open_digit(ref: str) -> Image.Image:
    """The written digit, 96x96 RGB: dark on light or light on dark, a little moved, turned and scaled."""
    from PIL import Image, ImageOps

    rng = random.Random(ref)  # noqa: S311
    pixels = bytes(level * 255 // _LEVELS for level in _row(ref)[:-1])
    size = rng.randrange(60, SIDE + 1)
    ink = Image.frombytes("L", (_PIXELS, _PIXELS), pixels).resize((size, size), Image.Resampling.BICUBIC)
    sheet = Image.new("L", (SIDE, SIDE))
    sheet.paste(ink, (rng.randrange(SIDE - size + 1), rng.randrange(SIDE - size + 1)))
    sheet = sheet.rotate(rng.gauss(0, 5), Image.Resampling.BILINEAR)
    light, dark = _tone(rng, 170, 250), _tone(rng, 5, 90)
    black, white = (light, dark) if rng.random() < 0.5 else (dark, light)
    return ImageOps.colorize(sheet, black, white)


def rows_of(split: str) -> range:
    """The rows of the file that belong to a split."""
    return range(TRAIN_ROWS) if split == TRAIN else range(TRAIN_ROWS, len(_rows()))


def _row(ref: str) -> tuple[int, ...]:
    parts = ref.removeprefix(PREFIX).split("/")
    good = ref.startswith(PREFIX) and len(parts) == 3 and parts[0] in SPLITS
    if not good or not all(part.isdecimal() for part in parts[1:]):
        raise InvalidRequest(f"{ref!r} is no written digit; write {PREFIX}SPLIT/SEED/INDEX, as {PREFIX}{HELD_OUT}/0/3")
    rows = rows_of(parts[0])
    return _rows()[rows[int(parts[2]) % len(rows)]]


@lru_cache(maxsize=1)
def _rows() -> tuple[tuple[int, ...], ...]:
    """64 grey levels of 0 to 16 and the digit, for each picture."""
    text = gzip.decompress((files("noria.scenes") / "data" / "digits.csv.gz").read_bytes()).decode()
    return tuple(tuple(int(float(cell)) for cell in line.split(",")) for line in text.splitlines())


def _tone(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randrange(low, high), rng.randrange(low, high), rng.randrange(low, high)
