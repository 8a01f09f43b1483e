"""Ten photographs that the world gave away, as pictures to name and as grounds for drawn scenes.

Comes in: a reference `photo:SPLIT/NAME/SEED`. Goes out: a random crop of that photograph, 96x96 RGB.
The files are scikit-image's own samples, made smaller; all are in the public domain or CC0 (`data/NOTICE.md`).
Pillow is imported when the first picture is opened.
"""

from __future__ import annotations

import random
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

from noria.errors import InvalidRequest
from noria.scenes.drawn.words import SPLITS

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "photo:"
PHOTOS: dict[str, str] = {
    "astronaut": "a smiling woman in an orange space suit",
    "brick": "a wall of bricks",
    "camera": "a man with a camera on a tripod",
    "chelsea": "a cat",
    "coffee": "a cup of coffee with a spoon",
    "coins": "old coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "stars and galaxies in the night sky",
    "rocket": "a rocket taking off",
}
"""What each photograph shows."""
SIDE = 96
_LEAST_SHARE = 0.7  # of the photograph's shorter side that a crop keeps: less might lose what is named
_MUTED = (85, 180)  # the grey levels between which a ground stays


def photo_ref(split: str, name: str, seed: int) -> str:
    """The reference of one crop of a photograph."""
    return f"{PREFIX}{split}/{name}/{seed}"


def read_photo(ref: str) -> tuple[str, str]:
    """The photograph's name and what it shows. Raises InvalidRequest for a malformed reference."""
    parts = ref.removeprefix(PREFIX).split("/")
    good = ref.startswith(PREFIX) and len(parts) == 3 and parts[0] in SPLITS and parts[2].isdecimal()
    if not good or parts[1] not in PHOTOS:
        raise InvalidRequest(f"{ref!r} is no photograph; write {PREFIX}SPLIT/NAME/SEED, names: {', '.join(PHOTOS)}")
    return parts[1], PHOTOS[parts[1]]


def open_photo(ref: str) -> Image.Image:
    """The crop that a reference stands for, 96x96 RGB: place, size and mirror follow from the reference."""
    from PIL import ImageEnhance, ImageOps

    name, _ = read_photo(ref)
    rng = random.Random(ref)  # noqa: S311
    picture = _crop(_photo(name), rng, _LEAST_SHARE, SIDE)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.75, 1.25))


def texture(rng: random.Random, side: int) -> Image.Image:
    """A small piece of a photograph with its contrast taken down, `side` pixels wide and high."""
    grey = _crop(_photo(rng.choice(tuple(PHOTOS))).convert("L"), rng, 0.3, side)
    low = rng.randrange(_MUTED[0], _MUTED[1] - 40)
    high = rng.randrange(low + 20, _MUTED[1])
    tint = [rng.randrange(-14, 15) for _ in range(3)]
    tables = [round(low + (high - low) * level / 255) + part for part in tint for level in range(256)]
    return grey.convert("RGB").point(tables)


def _crop(photo: Image.Image, rng: random.Random, least: float, side: int) -> Image.Image:
    size = rng.uniform(least, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - size), rng.uniform(0, photo.height - size)
    return photo.resize((side, side), box=(left, top, left + size, top + size))


@lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> Image.Image:
    from PIL import Image

    with (files("noria.scenes") / "data" / f"{name}.jpg").open("rb") as file, Image.open(file) as picture:
        return picture.convert("RGB")
