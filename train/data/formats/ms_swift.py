"""ms-swift's rows: `messages` with `<image>` in their texts, `images`, and for preferences `rejected_response`.

https://swift.readthedocs.io (custom dataset). The older `query`, `response`, `history`, `system` are read too. A list
of rejected responses makes as many pairs. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, plain_text, read_turns


def parse(row: Json, place: Place) -> list[Conversation]:
    """The row's conversation, once a rejected answer. Raises InvalidRequest."""
    pictures = Pictures(place, row.get("images") or row.get("image"))
    found = conversation(read_turns(_messages(row), pictures, tags=True))
    rejected = _rejected(row, place)
    if not rejected:
        return [found]
    if any(not text.strip() for text in rejected):
        raise InvalidRequest("a rejected answer is blank")
    return [replace(found, rejected=text) for text in rejected]


def _messages(row: Json) -> Any:
    if row.get("messages") is not None:
        return row["messages"]
    if not isinstance(row.get("query"), str) or not isinstance(row.get("response"), str):
        raise InvalidRequest("the row has neither messages nor query and response")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns = []
    for asked, answered in row.get("history") or []:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    last = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}]
    return [*system, *turns, *last]


def _rejected(row: Json, place: Place) -> list[str]:
    found = row.get("rejected_response")
    if found is None and row.get("rejected_messages"):
        turns = read_turns(row["rejected_messages"], Pictures(place, row.get("rejected_images")), tags=True)
        found = plain_text(turns[-1])
    if found is None:
        return []
    texts = [found] if isinstance(found, str) else list(found)
    if any(not isinstance(text, str) for text in texts):
        raise InvalidRequest("rejected_response is neither a text nor a list of texts")
    return texts
