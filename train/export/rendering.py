"""From a conversation to a model's inputs, the way the serving engine would see it.

Comes in: OpenAI-shaped messages (templated by `train.data.render`) and the pictures they show. Goes out: the
processor's tensors, at most so many tokens.
The chat template writes every special token itself, so the tokenizer adds none (vLLM does the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from noria.records import Json
from train.data.render import ChatRenderer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class CalibrationSample:
    """One conversation, its answer as the last assistant message; `images` in the order in which messages show them.

    `cut`: the answer ran into its limit of tokens, so that no end of turn follows it.
    """

    messages: list[Json]
    images: list[Image] = field(default_factory=list)
    cut: bool = False


def render(processor: Any, messages: Sequence[Json], *, cut: bool = False) -> str:
    """The templated conversation: up to the end of its last answer or, after a question, to where the answer begins.

    A `cut` answer is not ended.
    """
    renderer = ChatRenderer(processor)
    if not messages or messages[-1].get("role") != "assistant":
        return renderer.prompt(messages)
    text = str(messages[-1].get("content") or "")
    return renderer.prompt(messages[:-1]) + renderer.answer(messages[:-1], text, cut=cut)


def encode_text(processor: Any, text: str, images: Sequence[Image]) -> dict[str, Any]:
    """The processor's tensors for one templated text: a batch of one, image placeholders expanded."""
    inputs = processor(
        text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=False, padding=False
    )
    return dict(inputs)


def encode(processor: Any, sample: CalibrationSample, max_tokens: int) -> dict[str, Any] | None:
    """A whole conversation as inputs, cut after `max_tokens`; None when the cut would go through a picture.

    None, too, when somebody wrote a picture's placeholder as text: the processor would look for the picture.
    """
    text = render(processor, sample.messages, cut=sample.cut)
    if text.count(ChatRenderer(processor).image_token) != len(sample.images):
        return None
    inputs = encode_text(processor, text, sample.images)
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
