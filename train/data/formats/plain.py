"""The plain rows: `{"image", "text"}`, `{"image", "question", "answer"}`, and labels for the vision tower.

A picture with a text is LLaVA's first stage: the prompt is the picture (and `prompt`, if the row has one), the text is
the answer. Labels are `{"image", "labels": {name: value}, "objects": [{"label", "box": [x0, y0, x1, y1]}]}`; boxes are
shares of width and height, or pixels when the row has `width` and `height`.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, read_turns
from train.data.samples import Box, VisionSample


def parse(row: Json, place: Place) -> list[Conversation]:
    """A picture with its text, or with a question and its answer. Raises InvalidRequest."""
    asked = row.get("question") or row.get("prompt") or ""
    answer = row.get("answer") if row.get("question") is not None else row.get("text")
    if not isinstance(answer, str) or not isinstance(asked, str):
        raise InvalidRequest("the row has no text (or no answer to its question)")
    if row.get("image") is None:
        raise InvalidRequest("the row has no image")
    turn = {"role": "user", "content": asked}
    return [conversation(read_turns([turn], Pictures(place, row["image"])), answer)]


def parse_labels(row: Json, place: Place, source: str) -> VisionSample:
    """A picture with labels and objects, at least one of either. Raises InvalidRequest."""
    labels, objects = row.get("labels") or {}, row.get("objects") or []
    if row.get("image") is None:
        raise InvalidRequest("the row has no image")
    if not isinstance(labels, Mapping) or not isinstance(objects, Sequence) or isinstance(objects, str):
        raise InvalidRequest("'labels' is not an object, or 'objects' is not a list")
    named = {str(name): str(value) for name, value in labels.items() if value is not None}
    if not named and not objects:
        raise InvalidRequest("the row has neither labels nor objects")
    boxes = tuple(_box(one, row) for one in objects)
    return VisionSample(place.reference(row["image"]), named, boxes, source)


def _box(value: Any, row: Json) -> Box:
    corners = (value.get("box") or value.get("bbox")) if isinstance(value, Mapping) else None
    if corners is None or value.get("label") is None or len(corners) != 4:
        raise InvalidRequest("an object is not {'label', 'box': [x0, y0, x1, y1]}")
    try:
        x0, y0, x1, y1 = (float(one) for one in corners)
        if row.get("width") and row.get("height"):
            x0, x1 = (x / float(row["width"]) for x in (x0, x1))
            y0, y1 = (y / float(row["height"]) for y in (y0, y1))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a box is not four numbers: {corners!r}") from error
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise InvalidRequest(
            f"box {list(corners)} is not within the picture (shares of 0..1, or give width and height)"
        )
    return Box(str(value["label"]), x0, y0, x1, y1)
