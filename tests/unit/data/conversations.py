"""Conversations that the tests encode: pictures of differing size and number, text alone, several turns."""

from __future__ import annotations

from PIL import Image

from noria.records import Json, image_references
from train.data.samples import Sample, image_part

SIZES = {"red": (40, 30), "blue": (20, 50), "green": (33, 33)}


def load_image(reference: str) -> Image.Image:
    """A picture by its colour: rings of it, so that no two places look alike."""
    picture = Image.new("RGB", SIZES[reference], reference)
    for ring in range(0, min(picture.size) // 2, 3):
        picture.paste((ring * 9 % 256, ring * 23 % 256, 90), (ring, ring, picture.width - 2 * ring, ring + 1))
    return picture


def asked(text: str, *pictures: str) -> Json:
    """A user's message: the pictures, then the text."""
    return {"role": "user", "content": [*map(image_part, pictures), {"type": "text", "text": text}]}


def told(text: str) -> Json:
    """An answer."""
    return {"role": "assistant", "content": text}


def sample(*messages: Json, source: str = "rows.jsonl:1", cut: bool = False) -> Sample:
    """Messages as a sample."""
    return Sample(messages, image_references(messages), source, cut)


ONE = sample(asked("what is it", "red"), told("a red square"))
TEXT = sample({"role": "system", "content": "be brief"}, asked("hi"), told("yes"))
TWO = sample(asked("what are these", "blue", "green"), told("a blue circle and a green one"))
TURNS = sample(
    asked("what is it", "red"),
    told("a big one"),
    asked("and this", "blue"),
    told("no"),
    asked("sure?"),
    told("the end"),
)
ALL = (ONE, TEXT, TWO, TURNS)
