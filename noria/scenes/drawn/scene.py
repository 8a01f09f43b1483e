"""What a drawn scene holds: everything about it follows from its reference.

Comes in: a reference `scene:SPLIT/KIND/SEED/INDEX`. Goes out: a `Scene`, drawn by `noria.scenes.drawn.drawing`.
Kinds: `one` shape, `two` shapes beside or above each other, `many` (one to three shapes, also alike), `digit`.
Must not import Pillow or numpy.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from noria.errors import InvalidRequest
from noria.scenes.drawn.words import BACKGROUNDS, MOST_THINGS, SPLITS, Look, digit_looks, shape_looks

PREFIX = "scene:"
KINDS = ("one", "two", "many", "digit")
CLEAR = 0.2
"""Two things are left/right (above/below) of each other when their centres differ by this share of the picture."""
_RADIUS = {"small": (0.105, 0.13), "large": (0.17, 0.205)}
_DIGIT_RADIUS = {"small": (0.2, 0.27), "large": (0.3, 0.38)}
_TILT = {"heart": 20, "star": 18, "cross": 20, "square": 20, "triangle": 20, "circle": 0}
_GAP = 0.03
_TRIES = 30


@dataclass(frozen=True)
class Thing:
    """One drawn thing: its words, its centre and radius as shares of the picture's side, its angle in degrees."""

    word: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        """Colour and word, as a question names it: `red circle`."""
        return f"{self.colour} {self.word}"


@dataclass(frozen=True)
class Scene:
    """One picture's content; `seed` is for whatever drawing leaves to chance (tints, texture, noise)."""

    ref: str
    split: str
    kind: str
    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def digit(self) -> Thing | None:
        """The digit, in a scene of that kind."""
        return self.things[0] if self.kind == "digit" else None


def scene_ref(split: str, kind: str, seed: int, index: int) -> str:
    """The reference of a scene; refuses words that no scene has."""
    _known("split", split, SPLITS)
    _known("kind of scene", kind, KINDS)
    return f"{PREFIX}{split}/{kind}/{seed}/{index}"


@lru_cache(maxsize=4096)
def read_scene(ref: str) -> Scene:
    """The scene that a reference stands for; the same on every machine. Raises InvalidRequest for a malformed one."""
    parts = ref.removeprefix(PREFIX).split("/")
    if not ref.startswith(PREFIX) or len(parts) != 4 or not all(part.isdecimal() for part in parts[2:]):
        raise InvalidRequest(f"{ref!r} is no scene; write {PREFIX}SPLIT/KIND/SEED/INDEX, as {PREFIX}train/two/0/17")
    split, kind = parts[0], parts[1]
    scene_ref(split, kind, int(parts[2]), int(parts[3]))
    rng = random.Random(ref)  # noqa: S311 - drawn pictures, no secret; a str seeds by SHA-512, the same everywhere
    background = rng.choice(BACKGROUNDS)
    looks = digit_looks(split, background) if kind == "digit" else shape_looks(split, background)
    return Scene(ref, split, kind, _things(rng, looks, kind), background, rng.getrandbits(32))


def side_of(thing: Thing, other: Thing) -> tuple[str, ...]:
    """Where `thing` lies seen from `other`: of left, right, above, below those that are clear."""
    words = []
    if abs(thing.x - other.x) >= CLEAR:
        words.append("left" if thing.x < other.x else "right")
    if abs(thing.y - other.y) >= CLEAR:
        words.append("above" if thing.y < other.y else "below")
    return tuple(words)


def _things(rng: random.Random, looks: tuple[Look, ...], kind: str) -> tuple[Thing, ...]:
    if kind == "digit":
        return (_digit(rng, rng.choice(looks)),)
    while True:  # looks that find no room are drawn again; small ones always find it
        things = _placed(rng, _chosen(rng, looks, kind), apart=kind == "two")
        if things is not None:
            return things


def _chosen(rng: random.Random, looks: tuple[Look, ...], kind: str) -> list[Look]:
    first = rng.choice(looks)
    if kind == "one":
        return [first]
    if kind == "two":  # unlike in both words, so that either alone names one of them
        return [first, rng.choice([one for one in looks if one.colour != first.colour and one.word != first.word])]
    count = 1 + rng.randrange(MOST_THINGS)
    in_what = rng.choice(("both", "both", "shape", "colour", "nothing"))
    among = [one for one in looks if _alike(one, first, in_what)]
    return [first, *(rng.choice(among) for _ in range(count - 1))]


def _alike(one: Look, other: Look, in_what: str) -> bool:
    same_word, same_colour = one.word == other.word, one.colour == other.colour
    return {"both": same_word and same_colour, "shape": same_word, "colour": same_colour, "nothing": True}[in_what]


def _digit(rng: random.Random, look: Look) -> Thing:
    radius = rng.uniform(*_DIGIT_RADIUS[look.size])
    x, y = (rng.uniform(radius + _GAP, 1 - radius - _GAP) for _ in range(2))
    return Thing(look.word, look.colour, look.size, x, y, radius, rng.gauss(0, 6))


def _placed(rng: random.Random, looks: list[Look], *, apart: bool) -> tuple[Thing, ...] | None:
    """Things in random places, none over another; `apart`: clearly beside or above each other. None: no room."""
    radii = [rng.uniform(*_RADIUS[look.size]) for look in looks]
    for _ in range(_TRIES):
        spots = [tuple(rng.uniform(r + _GAP, 1 - r - _GAP) for _ in range(2)) for r in radii]
        if _free(spots, radii) and (not apart or _clear(spots[0], spots[1])):
            return tuple(
                Thing(look.word, look.colour, look.size, x, y, radius, rng.uniform(-_TILT[look.word], _TILT[look.word]))
                for look, radius, (x, y) in zip(looks, radii, spots, strict=True)
            )
    return None


def _free(spots: list[tuple[float, ...]], radii: list[float]) -> bool:
    return all(math.dist(spots[i], spots[j]) > radii[i] + radii[j] + _GAP for i in range(len(spots)) for j in range(i))


def _clear(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return max(abs(first[0] - second[0]), abs(first[1] - second[1])) >= CLEAR


def _known(what: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise InvalidRequest(f"unknown {what} {word!r}; there are {', '.join(words)}")
