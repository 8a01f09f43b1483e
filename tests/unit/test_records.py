"""Which pictures messages show, whatever shape their parts have."""

from __future__ import annotations

from typing import Any

import pytest

from noria.records import BLOB_SCHEME, Json, image_references

STORED = BLOB_SCHEME + "a" * 64


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image_url", "image_url": {"url": STORED}}, (STORED,)),
        ({"type": "image_url", "image_url": {"url": "https://x.org/a.png", "detail": "low"}}, ("https://x.org/a.png",)),
        ({"type": "input_image", "image_url": STORED}, (STORED,)),
        ({"type": "image"}, ("",)),
        ({"type": "image_url", "image_url": None}, ("",)),
        ({"type": "video_url", "video_url": {"url": STORED}}, ()),
        ({"type": "text", "text": STORED}, ()),
        ("a text", ()),
    ],
)
def test_each_picture_is_told_once_as_it_stands(part: Any, told: tuple[str, ...]) -> None:
    messages: list[Json] = [
        {"role": "system", "content": STORED},
        {"role": "user", "content": [part]},
        {"role": "assistant"},
    ]
    assert image_references(messages) == told


def test_pictures_come_in_the_order_of_the_messages() -> None:
    parts = [{"type": "image_url", "image_url": {"url": name}} for name in "abc"]
    assert image_references([{"content": parts[:1]}, {"content": "x"}, {"content": parts[1:]}]) == ("a", "b", "c")
