"""Prompts' pictures: as `data:` URLs for the engine, and as the model's own processor makes them for the trainer.

Comes in: messages with references, a way to read stored pictures, a processor. Goes out: messages for the wire,
tensors. The engine gets the very bytes that the trainer decodes; what is drawn on the fly goes as PNG, which loses
nothing. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image as Pillow

from noria.errors import TrainingError
from noria.records import PICTURE_PARTS, Json, image_references
from train.data.formats.pictures import as_data_url
from train.data.render import ChatRenderer
from train.data.samples import LoadImage
from train.methods.grpo.groups import Group

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
_SHOWN = 100


class WirePictures:
    """Turns a prompt's references into `data:` URLs. `read` gives a picture's file (`ImageLoader.read`).

    `placeholder` is what stands for a picture in the model's own texts (`<image>`). Whoever writes it says a picture's
    token without a picture: engine and trainer would not agree on such a prompt, and it is asked by neither.
    """

    def __init__(self, read: Callable[[str], bytes], placeholder: str) -> None:
        self._read = read
        self._placeholder = placeholder

    def __call__(self, messages: Sequence[Json]) -> list[Json]:
        """The messages. Raises TrainingError for a picture that cannot be read, or a text with the placeholder."""
        return [self._message(message) for message in messages]

    def _message(self, message: Json) -> Json:
        content = message.get("content")
        if isinstance(content, str):
            self._text(content)
        if not isinstance(content, list):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Json | str) -> Json:
        if isinstance(part, str):
            return self._text(part)
        if part.get("type") in ("text", "input_text"):
            return self._text(part["text"])
        if part.get("type") not in PICTURE_PARTS:
            return part
        (reference,) = image_references([{"content": [part]}])
        return {"type": "image_url", "image_url": {"url": self._url(reference)}}

    def _text(self, text: str) -> Json:
        if self._placeholder in text:
            told = f"a text holds {self._placeholder!r}, which the model reads as a picture"
            raise TrainingError(told, code="placeholder")
        return {"type": "text", "text": text}

    def _url(self, reference: str) -> str:
        if reference.startswith("data:"):
            return reference
        data = self._read(reference)
        try:
            with Pillow.open(BytesIO(data)) as picture:
                kind = picture.get_format_mimetype() or "image/png"
        except OSError as error:
            raise TrainingError(f"picture {reference[:_SHOWN]} is none: {error!r}", code="bad_image") from error
        return as_data_url(data, kind)


class ModelPictures:
    """A group's pictures as tensors, by the processor's names. `image_id` is the token of their placeholders."""

    def __init__(self, processor: Any, load_image: LoadImage, image_id: int) -> None:
        self._processor = processor
        self._load_image = load_image
        self._image_id = image_id
        self._placeholder = ChatRenderer(processor).image_token

    def __call__(self, group: Group) -> dict[str, torch.Tensor]:
        """Empty for a prompt without pictures.

        Raises TrainingError for one that cannot be read, or where the engine's prompt has another number of their
        tokens (code `image_tokens`).
        """
        given = group.prompt_token_ids.count(self._image_id)
        pictures = [self._load_image(reference) for reference in group.prompt.images]
        if not pictures:
            _require_places(given, 0, group)
            return {}
        text = self._placeholder * len(pictures)
        found = self._processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)
        _require_places(given, int((torch.as_tensor(found["input_ids"]) == self._image_id).sum()), group)
        return {name: torch.as_tensor(value) for name, value in found.items() if name not in _TOKENS}


def _require_places(given: int, expected: int, group: Group) -> None:
    if given != expected:
        raise TrainingError(
            f"{group.prompt.source}: the engine's prompt has {given} tokens of pictures, the trainer's processor makes "
            f"{expected} of its {len(group.prompt.images)}: engine and trainer prepare pictures differently",
            code="image_tokens",
        )
