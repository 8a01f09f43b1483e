"""Rows of JSON as samples.

Comes in: one object a sample, as `noria sample --json` writes it or as anybody may. Goes out: `Sample`.
Must not import torch or `serve`.

`{"messages": [..] or "prompt": [..] or a text, "text": "..", "finish_reason": "stop", "answers": [..] or "answer": ..,
"token_ids": [..] or "tokens": 12, ...}`; only the text must be there. Every other key is kept in `extra`, where rewards
look for `options`, `metric` and `tolerance`.
"""

from __future__ import annotations

from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from train.rewards.protocol import Sample

_KEYS = frozenset({"messages", "prompt", "text", "finish_reason", "answers", "answer", "token_ids", "tokens"})


def sample_of(row: Any, where: str) -> Sample:
    """The row's sample. Raises InvalidRequest, beginning with `where`, for a row that is none."""
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where}: not a JSON object", param="row")
    if not isinstance(row.get("text"), str):
        raise InvalidRequest(f"{where}: no 'text', the sampled answer", param="text")
    tokens = row.get("tokens", len(row["token_ids"]) if isinstance(row.get("token_ids"), list) else None)
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise InvalidRequest(f"{where}: 'tokens' must be how many were sampled", param="tokens")
    return Sample(
        prompt=_messages(row, where),
        text=row["text"],
        finish_reason=str(row.get("finish_reason") or "stop"),
        answers=_answers(row, where),
        extra={key: value for key, value in row.items() if key not in _KEYS},
        tokens=tokens,
    )


def _messages(row: Json, where: str) -> list[Json]:
    told = row.get("messages", row.get("prompt", []))
    if isinstance(told, str):
        return [{"role": "user", "content": told}]
    if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
        raise InvalidRequest(f"{where}: the prompt must be a text or a list of messages", param="messages")
    return told


def _answers(row: Json, where: str) -> tuple[str, ...]:
    told = row.get("answers", row.get("answer"))
    listed = [] if told is None else told if isinstance(told, list) else [told]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in listed):
        raise InvalidRequest(f"{where}: 'answers' must be a text, a number or a list of them", param="answers")
    return tuple(str(one) for one in listed)
