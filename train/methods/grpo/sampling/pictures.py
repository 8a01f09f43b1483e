"""Prompts' pictures: as `data:` URLs for the engine, and as the model's own processor makes them for the trainer.

Comes in: messages with references, a way to read stored pictures, a processor. Goes out: messages for the wire,
tensors. The engine gets the very bytes that the trainer decodes; what is drawn on the fly goes as PNG, which loses
nothing. Must not import `serve`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow

from noria.errors import NoriaError, TrainingError
from noria.records import BLOB_SCHEME, Json
from noria.scenes import draw, is_made
from train.data.render import ChatRenderer
from train.data.samples import LoadImage
from train.data.sources.files import is_url
from train.methods.grpo.groups import Group

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
_SHA256_LETTERS = 64
_SHOWN = 100


class WirePictures:
    """Turns a prompt's references into `data:` URLs. `read_blob` gives a stored picture's bytes by its SHA-256."""

    def __init__(self, read_blob: Callable[[str], bytes]) -> None:
        self._read_blob = read_blob

    def __call__(self, messages: Sequence[Json]) -> list[Json]:
        """The messages. Raises TrainingError naming a picture that cannot be read."""
        return [self._message(message) for message in messages]

    def _message(self, message: Json) -> Json:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Json) -> Json:
        if part.get("type") != "image_url":
            return part
        shown = part["image_url"]
        url = shown["url"] if isinstance(shown, Mapping) else shown
        return {"type": "image_url", "image_url": {"url": self._url(str(url))}}

    def _url(self, reference: str) -> str:
        if reference.startswith("data:"):
            return reference
        try:
            data = self._bytes(reference)
            with Pillow.open(BytesIO(data)) as picture:
                kind = picture.get_format_mimetype() or "image/png"
        except Exception as error:  # file systems and decoders raise what their libraries do
            why = error.message if isinstance(error, NoriaError) else repr(error)
            raise TrainingError(f"picture {reference[:_SHOWN]} cannot be read: {why}", code="bad_image") from error
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def _bytes(self, reference: str) -> bytes:
        if is_made(reference):
            sink = BytesIO()
            draw(reference).save(sink, format="PNG")
            return sink.getvalue()
        name = reference.removeprefix(BLOB_SCHEME)
        if len(name) == _SHA256_LETTERS and name.isalnum():
            return self._read_blob(name)
        if is_url(reference):
            import fsspec

            with fsspec.open(f"simplecache::{reference}", "rb") as stream:
                return bytes(stream.read())
        return Path(reference).read_bytes()


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
