"""What the vision tower is taught about a made picture: one word per attribute, and a box around each thing.

Comes in: a picture's reference. Goes out: `Labels`.
A box's label is a few words (`large red circle left`); each word is a fact about the thing in the box.
Must not import Pillow or numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

from noria.scenes import handwriting, photos
from noria.scenes.drawn.scene import Scene, Thing, read_scene, side_of

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
    words = [thing.size, thing.colour, thing.word]
    if len(scene.things) == 2:
        words += side_of(thing, scene.things[1 - scene.things.index(thing)])
    reach = thing.radius
    return (" ".join(words), thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
