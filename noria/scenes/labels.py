"""What the vision tower is taught about a made picture: one word per attribute, and a box around each thing or word.

Comes in: a picture's reference. Goes out: `Labels`.
A thing's box has a few words (`large red circle left`); each word is a fact about the thing in the box.
Written out, the same facts stand as in a text: things from left to right, each a row of cells, each word in a cell.
Must not import Pillow or numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from noria.scenes import handwriting, photos
from noria.scenes.drawn.scene import Scene, Thing, read_scene, side_of
from noria.scenes.drawn.words import MOST_THINGS

CELLS = 6
"""Cells on a side of a picture whose facts are written out: a patch each, where a patch is a sixth of it."""
_WHAT = 2  # the column of what a thing is

BoxRow = tuple[str, float, float, float, float]
"""Words, then left, top, right and bottom as shares of the picture."""


@dataclass(frozen=True)
class Labels:
    """A picture's attributes and boxes; of `colour`, `shape`, `size`, `count`, `digit` and `photo` it has some."""

    attributes: dict[str, str]
    boxes: tuple[BoxRow, ...]


def read_labels(ref: str) -> Labels:
    """The labels of a made picture. Raises InvalidRequest for a reference that names nothing."""
    if ref.startswith(handwriting.PREFIX):
        return Labels({"digit": handwriting.read_digit(ref)}, ())
    if ref.startswith(photos.PREFIX):
        return Labels({"photo": photos.read_photo(ref)[0]}, ())
    return scene_labels(read_scene(ref))


def write_labels(ref: str) -> Labels:
    """The same facts written out over the picture, wherever the things are: what a tower learns by them it says in
    order, a word a patch, and a language model finds a thing's words beside each other as in a sentence.

    The picture has `CELLS` by `CELLS` cells. A row is a thing: its size, its colour, what it is, its two sides; things
    go from left to right, and behind the most that there can be stands their number.
    """
    if ref.startswith((handwriting.PREFIX, photos.PREFIX)):
        (word,) = read_labels(ref).attributes.values()
        return Labels({}, (_cell(0, _WHAT, word),))
    scene = read_scene(ref)
    boxes = [cell for row, thing in enumerate(sorted(scene.things, key=_place)) for cell in _row(row, thing, scene)]
    if scene.kind != "digit":
        boxes.append(_cell(MOST_THINGS, 0, str(len(scene.things))))
    return Labels({}, tuple(boxes))


def scene_labels(scene: Scene) -> Labels:
    """Attributes that all things share, how many there are, and each thing's words."""
    boxes = tuple(_box(thing, scene) for thing in scene.things)
    first = scene.things[0]
    if scene.kind == "digit":
        return Labels({"digit": first.word, "colour": first.colour, "size": first.size}, boxes)
    shared = {"count": str(len(scene.things))}
    for name, values in (
        ("colour", {thing.colour for thing in scene.things}),
        ("shape", {thing.word for thing in scene.things}),
        ("size", {thing.size for thing in scene.things}),
    ):
        if len(values) == 1:
            shared[name] = values.pop()
    return Labels(shared, boxes)


def _box(thing: Thing, scene: Scene) -> BoxRow:
    words = (thing.size, thing.colour, thing.word, *_sides(thing, scene))
    reach = thing.radius
    return (" ".join(words), thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)


def _row(row: int, thing: Thing, scene: Scene) -> Iterator[BoxRow]:
    yield _cell(row, 0, thing.size)
    yield _cell(row, 1, thing.colour)
    yield _cell(row, _WHAT, thing.word)
    for side in _sides(thing, scene):
        yield _cell(row, _WHAT + (1 if side in ("left", "right") else 2), side)


def _cell(row: int, column: int, word: str) -> BoxRow:
    return (word, column / CELLS, row / CELLS, (column + 1) / CELLS, (row + 1) / CELLS)


def _sides(thing: Thing, scene: Scene) -> tuple[str, ...]:
    if len(scene.things) != 2:
        return ()
    return side_of(thing, scene.things[1 - scene.things.index(thing)])


def _place(thing: Thing) -> float:
    return thing.x
