"""Stored completions as OpenAI's API shapes them.

Comes in: `Completion` records. Goes out: dicts of OpenAI's schema (chat.completion, store messages, pages).
https://platform.openai.com/docs/api-reference/chat/list. Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from noria.records import BLOB_SCHEME, Completion, Json

ECHOED = (  # request parameters that OpenAI shows again on a stored completion
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "max_completion_tokens",
    "n", "stop", "tools", "tool_choice", "response_format", "service_tier",
)  # fmt: skip


def completion_object(completion: Completion) -> Json:
    """A `chat.completion`, with what the request asked for, and Noria's own fields `model_version` and `finished`."""
    echoed = {key: completion.params.get(key) for key in ECHOED}
    return {
        "id": completion.id,
        "object": "chat.completion",
        "created": int(completion.created_at),
        "model": completion.model,
        "choices": [
            {
                "index": choice.index,
                "message": {"refusal": None, **choice.message},
                "finish_reason": choice.finish_reason,
                "logprobs": None,
            }
            for choice in completion.choices
        ],
        "usage": completion.usage,
        "system_fingerprint": completion.system_fingerprint,
        "metadata": completion.metadata,
        "input_user": completion.end_user,
        **echoed,
        "model_version": completion.model_version,
        "finished": completion.finished,
    }


def store_messages(completion: Completion, picture: Callable[[str], str | None]) -> list[Json]:
    """The request's messages, each with an id. `picture` gives the data URL of a stored SHA-256, or None."""
    return [
        _store_message(f"{completion.id}-{index}", message, picture)
        for index, message in enumerate(completion.messages)
    ]


def _store_message(message_id: str, message: Json, picture: Callable[[str], str | None]) -> Json:
    content = message.get("content")
    parts = None
    if isinstance(content, list):
        parts = [_with_picture(part, picture) for part in content]
        content = None
    return {"name": None, "refusal": None, **message, "id": message_id, "content": content, "content_parts": parts}


def _with_picture(part: Any, picture: Callable[[str], str | None]) -> Any:
    shown = part.get("image_url") if isinstance(part, dict) else None
    if not isinstance(shown, dict):  # one that was not stored may be a plain string
        return part
    url = shown.get("url")
    if not isinstance(url, str) or not url.startswith(BLOB_SCHEME):
        return part
    return {**part, "image_url": {**shown, "url": picture(url.removeprefix(BLOB_SCHEME)) or url}}


def page(objects: Sequence[Json], limit: int) -> Json:
    """A page of at most `limit`; `objects` holds one more where there is a next page."""
    data = list(objects[:limit])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(objects) > limit,
    }
