"""Chat messages as the very text that the serving engine would prompt with.

Comes in: OpenAI-shaped messages and a checkpoint's processor. Goes out: prompt and answer text for training.
Must not import `serve`.

vLLM decides by the template whether content is handed over as a list of parts or as one string (its
`--chat-template-content-format auto`); training has to follow it, or the model would learn on prompts that it never
sees. For templates that want strings, vLLM puts the image placeholders in front of the text, one a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image as Pillow
from PIL import ImageOps

from noria.errors import TrainingError
from noria.records import BLOB_SCHEME, PICTURE_PARTS, Json, image_references

_PROBE = "noria-content-probe"


class ChatRenderer:
    """Renders with one checkpoint's chat template. `processor` is a transformers processor or tokenizer."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt's text, up to where the answer begins. Raises TrainingError when there is no template."""
        return self._apply(messages, add_generation_prompt=True)

    def answer(self, messages: Sequence[Mapping[str, Any]], text: str, *, cut: bool = False) -> str:
        """What the model has to say after `prompt(messages)`: the text and the template's end of turn.

        Where the template closes a turn with the end-of-sequence token, nothing after it is kept: the engine stops
        there. An answer that was `cut` by its limit of tokens has no end of turn: the model never said it, and to
        train on one would teach it when to end from where a limit happened to fall.
        """
        if cut:
            return text
        prompt = self.prompt(messages)
        whole = self._apply([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)
        if not whole.startswith(prompt):  # the template rewrites earlier turns: close the turn by hand
            return text + str(self.tokenizer.eos_token or "")
        tail = whole[len(prompt) :]
        eos = self.tokenizer.eos_token
        end = tail.rfind(eos) if eos else -1
        if end >= len(text):
            return tail[: end + len(eos)]
        return tail.rstrip("\n") + str(eos or "")

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template reads content as a list of parts (vLLM's "openai" format) or as one string."""
        parts = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            rendered = self._template(parts, add_generation_prompt=False)
        except Exception:  # noqa: BLE001 - a template is foreign code; one that dies on parts wants strings
            return False
        return _PROBE in rendered and "'type'" not in rendered

    @cached_property
    def image_token(self) -> str:
        """The text that stands for one picture in a string-format prompt."""
        token = getattr(self.processor, "image_token", None)
        return str(token) if token is not None else "<image>"

    def _apply(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        shaped = [self._shape(message) for message in messages]
        return self._template(shaped, add_generation_prompt=add_generation_prompt)

    def _template(self, messages: list[Json], *, add_generation_prompt: bool) -> str:
        if not (getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)):
            raise TrainingError("the model has no chat template: its prompts cannot be rendered", code="no_template")
        owner = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        return str(owner.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False))

    def _shape(self, message: Mapping[str, Any]) -> Json:
        parts = parts_of(message)
        if self.wants_parts:
            return {**message, "content": parts}
        texts = [part["text"] for part in parts if part["type"] == "text"]
        missing = sum(part["type"] == "image" for part in parts) - sum(text.count(self.image_token) for text in texts)
        return {**message, "content": "\n".join([self.image_token] * missing + texts)}


def parts_of(message: Mapping[str, Any]) -> list[Json]:
    """A message's content as parts of type `text` and `image`, in order. Raises TrainingError for any other part."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[Json] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type")
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in PICTURE_PARTS:
            parts.append({"type": "image"})
        else:
            raise TrainingError(f"messages with a {kind!r} part cannot be trained on", code="bad_message")
    return parts


def is_readable(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether captured messages can be rendered: texts and stored pictures, and nothing else.

    The engine fetches a picture that a user named by its address, and it plays films; here neither is done.
    """
    try:
        for message in messages:
            parts_of(message)
    except TrainingError:
        return False
    return all(reference.startswith(BLOB_SCHEME) for reference in image_references(messages))


def decode_image(data: bytes) -> Pillow.Image:
    """A picture as RGB, bit for bit as the serving engine (vLLM 0.31) reads it: upright, transparent ones on white."""
    picture: Pillow.Image = Pillow.open(BytesIO(data))
    with suppress(Exception):  # broken EXIF turns nothing
        picture = ImageOps.exif_transpose(picture)
    picture.load()
    if picture.mode == "RGB":  # whatever colour such a file calls transparent
        return picture
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        ground = Pillow.new("RGB", layered.size, (255, 255, 255))
        ground.paste(layered, mask=layered.getchannel("A"))
        return ground
    return picture.convert("RGB")
