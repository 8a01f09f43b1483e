"""TRL's data set types: `messages`; `prompt` with `completion`; `chosen` and `rejected`, with or without a `prompt`.

https://huggingface.co/docs/trl/dataset_formats; both the conversational kind (lists of messages) and the standard one
(strings, where the prompt becomes a user's message). Pictures are in `images` (or `image`), placeholders are parts
`{"type": "image"}`. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, plain_text, read_turns


def parse(row: Json, place: Place) -> list[Conversation]:
    """The row's conversation. Raises InvalidRequest."""
    pictures = Pictures(place, row.get("images") or row.get("image"))
    if row.get("messages") is not None:
        return [conversation(read_turns(row["messages"], pictures))]
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return [_preference(row, pictures)]
    if row.get("prompt") is None or row.get("completion") is None:
        raise InvalidRequest("the row has neither messages, nor prompt and completion, nor chosen and rejected")
    return [conversation(_prompt(row["prompt"], pictures), _answer(row["completion"], pictures))]


def _preference(row: Json, pictures: Pictures) -> Conversation:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise InvalidRequest("the row has only one of chosen and rejected")
    if row.get("prompt") is not None:
        prompt = _prompt(row["prompt"], pictures)
        return conversation(prompt, _answer(chosen, pictures), _answer(rejected, pictures))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise InvalidRequest("chosen and rejected are texts, and there is no prompt that they answer")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = read_turns(chosen[:shared], pictures)
    return conversation(prompt, _answer(chosen[shared:], pictures), _answer(rejected[shared:], pictures))


def _prompt(prompt: Any, pictures: Pictures) -> list[Json]:
    return read_turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, pictures)


def _answer(answer: Any, pictures: Pictures) -> str:
    if isinstance(answer, str):
        return answer
    turns = read_turns([answer] if isinstance(answer, dict) else answer, pictures)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise InvalidRequest("an answer is not one assistant's message")
    return plain_text(turns[0])
