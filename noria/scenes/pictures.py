"""Opens whatever `noria.scenes` makes, by its reference alone.

Comes in: `scene:...`, `digit:...` or `photo:...`. Goes out: a 96x96 RGB picture.
Pillow and numpy are imported when the first picture is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from noria.errors import InvalidRequest
from noria.scenes import handwriting, photos
from noria.scenes.drawn import scene

if TYPE_CHECKING:
    from PIL import Image

PREFIXES = (scene.PREFIX, handwriting.PREFIX, photos.PREFIX)
"""How a reference to a made picture begins."""


def is_made(ref: str) -> bool:
    """Whether a picture's reference names something that is made on the fly."""
    return ref.startswith(PREFIXES)


def draw(ref: str) -> Image.Image:
    """The picture of a reference, 96x96 RGB. Raises InvalidRequest for one that names nothing."""
    from noria.scenes.drawn.drawing import draw_scene

    if ref.startswith(scene.PREFIX):
        return draw_scene(scene.read_scene(ref))
    if ref.startswith(handwriting.PREFIX):
        return handwriting.open_digit(ref)
    if ref.startswith(photos.PREFIX):
        return photos.open_photo(ref)
    raise InvalidRequest(f"{ref!r} is no made picture; references begin with {', '.join(PREFIXES)}")
