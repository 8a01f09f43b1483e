"""From a conversation to a model's inputs, the way the serving engine would see it.

Comes in: OpenAI-shaped messages and the pictures they show. Goes out: the processor's tensors, at most so many tokens.
The chat template writes every special token itself, so the tokenizer adds none (vLLM does the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from noria.records import Json

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGE_PARTS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class CalibrationSample:
    """One conversation, its answer as the last assistant message; `images` in the order in which messages show them."""

    messages: list[Json]
    images: list[Image] = field(default_factory=list)


def template_messages(messages: Sequence[Json]) -> list[Json]:
    """Messages as chat templates want them: every content a list of `{"type":"text"}` and `{"type":"image"}` parts."""
    rendered = []
    for message in messages:
        content = message.get("content")
        parts: list[Json] = [{"type": "text", "text": content}] if isinstance(content, str) else []
        for part in content if isinstance(content, list) else []:
            if part["type"] in _IMAGE_PARTS:
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
        rendered.append({**message, "content": parts})
    return rendered


def render(processor: Any, messages: Sequence[Json], *, prompt: bool = False) -> str:
    """The templated text; with `prompt` it ends where the assistant begins to speak."""
    text: str = processor.apply_chat_template(
        template_messages(messages), tokenize=False, add_generation_prompt=prompt
    )
    return text


def encode_text(processor: Any, text: str, images: Sequence[Image]) -> dict[str, Any]:
    """The processor's tensors for one templated text: a batch of one, image placeholders expanded."""
    inputs = processor(
        text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=False, padding=False
    )
    return dict(inputs)


def encode(processor: Any, sample: CalibrationSample, max_tokens: int) -> dict[str, Any] | None:
    """A whole conversation as inputs, cut after `max_tokens`; None when the cut would go through a picture."""
    inputs = encode_text(processor, render(processor, sample.messages), sample.images)
    length = int(inputs["input_ids"].shape[1])
    if length <= max_tokens:
        return inputs
    pictures = (inputs["input_ids"][0] == image_token_id(processor)).nonzero()
    if sample.images and (not len(pictures) or int(pictures[-1]) >= max_tokens):
        return None
    return {
        name: value[:, :max_tokens] if value.ndim == 2 and value.shape[1] == length else value
        for name, value in inputs.items()
    }


def image_token_id(processor: Any) -> int:
    """The id of the placeholder that a picture's features replace."""
    known = getattr(processor, "image_token_id", None)
    return int(known if known is not None else processor.tokenizer.convert_tokens_to_ids(processor.image_token))
