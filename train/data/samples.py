"""What supervised and preference stages train on: conversations, pictures with labels, pairs. Values only.

Comes in: rows that `train.data.formats` understood. Goes out: frozen samples, the same from every source.
Must not import torch, transformers or `serve`.

A picture is named by a string, its *reference*: the SHA-256 of a stored blob, a path, a `data:`, `http(s)://`, `s3://`
or other fsspec URL, or the name of something drawn on the fly (`scene:...`). A `LoadImage` turns it into pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image as Pillow

from noria.records import BadRow, Json

LoadImage = Callable[[str], Pillow.Image]
"""From a picture's reference to the picture, as RGB. Raises TrainingError naming a picture that cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One conversation in OpenAI's shape; its last message is the assistant's, and the answer to be learnt.

    Pictures are parts `{"type": "image_url", "image_url": {"url": REFERENCE}}`; `images` repeats their references, in
    the order of the messages. `source` says where the row came from (`file:line`). `cut`: the answer ran
    into its limit of tokens, so that no end of turn is learnt after it.
    """

    messages: tuple[Json, ...]
    images: tuple[str, ...]
    source: str
    cut: bool = False


@dataclass(frozen=True)
class Box:
    """An object in a picture: its corners as shares of width and height (0..1), x to the right and y down."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class VisionSample:
    """A picture with labels for the vision tower: one value a label's name, and the boxes of its objects."""

    image: str
    labels: dict[str, str]
    boxes: tuple[Box, ...]
    source: str


@dataclass(frozen=True)
class PreferenceSample:
    """A prompt (`messages` ends before the answer) with a better and a worse answer to it."""

    messages: tuple[Json, ...]
    images: tuple[str, ...]
    chosen: str
    rejected: str
    source: str
    chosen_cut: bool = False
    rejected_cut: bool = False


@dataclass(frozen=True)
class ThumbSample:
    """A prompt (`messages` ends before the answer) with one answer to it, good (`up`) or bad."""

    messages: tuple[Json, ...]
    images: tuple[str, ...]
    answer: str
    up: bool
    source: str
    cut: bool = False


AnySample = Sample | VisionSample | PreferenceSample | ThumbSample


@dataclass(frozen=True)
class ReadReport:
    """What was read from one source.

    `counts`: `rows` = `kept` + `bad` + `left_out` (rows that say nothing for this kind, as a tie does for preferences)
    + `not_asked` (beyond the source's `count`). `sha256` is over the kept rows as they were written, in order; the
    bytes of pictures that the rows only name are not in it.
    """

    source: str
    format: str
    counts: dict[str, int]
    bad: tuple[BadRow, ...] = ()
    sha256: str = ""


def image_part(reference: str) -> Json:
    """The part of a message that shows a picture."""
    return {"type": "image_url", "image_url": {"url": reference}}


@dataclass
class Counts:
    """What an encoder did with samples, one count each time it met one.

    `dropped` says why, by reason; `last_only` are conversations of which only the last answer is learnt, since the
    tokenizer or the template joins the earlier ones with what surrounds them.
    """

    whole: int = 0
    shortened: int = 0
    last_only: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts one sample that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
