"""Rows with `conversations` of `from` and `value`, LLaVA's and LLaMA-Factory's; the latter's `instruction` rows too.

LLaVA (https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md) has one `image`; LLaMA-Factory
(https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md) has `images`, and `chosen` and `rejected` for
preferences. In both `<image>` in a text shows the next picture. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, plain_text, read_turns

_KEYS = ("from", "value")


def parse_llava(row: Json, place: Place) -> list[Conversation]:
    """A LLaVA row. Raises InvalidRequest."""
    pictures = Pictures(place, row.get("image") or row.get("images"))
    return [conversation(read_turns(row.get("conversations"), pictures, keys=_KEYS, tags=True))]


def parse_llama_factory(row: Json, place: Place) -> list[Conversation]:
    """A LLaMA-Factory row, sharegpt or alpaca. Raises InvalidRequest."""
    pictures = Pictures(place, row.get("images") or row.get("image"))
    if row.get("instruction") is not None:
        return [_alpaca(row, pictures)]
    keys = _KEYS if row.get("conversations") is not None else ("role", "content")
    raw = row.get("conversations") if keys == _KEYS else row.get("messages")
    turns = _system(row) + read_turns(raw, pictures, keys=keys, tags=True)
    if row.get("chosen") is None and row.get("rejected") is None:
        return [conversation(turns)]
    return [conversation(turns, *(_answer(row.get(key), key, keys, pictures) for key in ("chosen", "rejected")))]


def _alpaca(row: Json, pictures: Pictures) -> Conversation:
    asked = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
    turns = []
    for question, answer in row.get("history") or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = _system(row) + read_turns([*turns, {"role": "user", "content": asked}], pictures, tags=True)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return conversation(prompt, *(_text(row.get(key), key) for key in ("chosen", "rejected")))
    return conversation(prompt, _text(row.get("output"), "output"))


def _answer(value: Any, key: str, keys: tuple[str, str], pictures: Pictures) -> str:
    if isinstance(value, str):
        return value
    turns = read_turns([value], pictures, keys=keys) if isinstance(value, dict) else []
    if not turns or turns[0]["role"] != "assistant":
        raise InvalidRequest(f"{key!r} is not an assistant's message")
    return plain_text(turns[0])


def _system(row: Json) -> list[Json]:
    return [{"role": "system", "content": str(row["system"])}] if row.get("system") else []


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{key!r} is {type(value).__name__}, not a text")
    return value
