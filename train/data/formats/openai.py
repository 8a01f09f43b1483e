"""OpenAI's fine-tuning files: `{"messages": [...]}`, and preferences as `{"input", "preferred_output", ...}`.

https://platform.openai.com/docs/guides/fine-tuning; pictures are `image_url` parts.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from noria.errors import InvalidRequest
from noria.records import Json
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, plain_text, read_turns


def parse(row: Json, place: Place) -> list[Conversation]:
    """The row's conversation. Raises InvalidRequest."""
    if "preferred_output" in row:
        return [_preference(row, place)]
    return [conversation(read_turns(row.get("messages"), Pictures(place, None)))]


def _preference(row: Json, place: Place) -> Conversation:
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise InvalidRequest("'input' has no messages")
    prompt = read_turns(asked.get("messages"), Pictures(place, None))
    chosen, rejected = (_answer(row.get(key), key, place) for key in ("preferred_output", "non_preferred_output"))
    return conversation(prompt, chosen, rejected)


def _answer(messages: object, key: str, place: Place) -> str:
    turns = read_turns(messages, Pictures(place, None))
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise InvalidRequest(f"{key!r} is not one assistant's message")
    return plain_text(turns[0])
