"""Stored completions in OpenAI's shape: pictures come back, and what was never stored stays as it was sent."""

from __future__ import annotations

from typing import Any

import pytest

from serve.api.openai.shapes import store_messages
from tests.unit.store.samples import completion

STORED = {"type": "image_url", "image_url": {"url": "noria-blob:abc", "detail": "low"}}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": "https://example.com/a.png"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": None},
        {"type": "text", "text": "See?"},
    ],
)
def test_what_was_not_stored_stays_as_it_was_sent(part: dict[str, Any]) -> None:
    assert parts_of(part) == [part]


def test_a_stored_picture_comes_back_and_a_lost_one_is_named() -> None:
    assert parts_of(STORED, {"abc": "data:image/png;base64,AA=="})[0]["image_url"] == {
        "url": "data:image/png;base64,AA==",
        "detail": "low",
    }
    assert parts_of(STORED) == [STORED]


def parts_of(part: dict[str, Any], stored: dict[str, str] | None = None) -> list[dict[str, Any]]:
    asked = completion(messages=({"role": "user", "content": [part]},))
    found: list[dict[str, Any]] = store_messages(asked, (stored or {}).get)[0]["content_parts"]
    return found
