"""Bodies: strict JSON, bounded in depth, number and size of values; and places that can be named."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.settings import InputSettings
from serve.input.body import read_body
from serve.input.tree import Fault, check_tree, dotted, place_of

LIMITS = InputSettings()
SMALL = InputSettings.model_validate({"max_elements": 1000, "images": {"max_count": 2}})
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=30,
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_is(value: Any) -> None:
    assert read_body(json.dumps(value).encode(), LIMITS) == value


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """And what is let in, the standard library reads alike."""
    try:
        value = read_body(data, LIMITS)
    except Fault as fault:
        assert fault.reason in ("body_json", "body_number", "body_depth", "body_text")
    else:
        assert value == json.loads(data)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"temperature": NaN}', "body_json"),
        (b'{"temperature": Infinity}', "body_json"),
        (b'{"temperature": -Infinity}', "body_json"),
        (b'{"temperature": 1e999}', "body_number"),
        (b'{"seed": ' + b"9" * 400 + b"}", "body_number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body_json"),
        (b'{"seed": 18446744073709551616}', "body_number"),
        (b'{"model": "a", "model": "b"}', "body_json"),
        (b'{"a": {"b": 1, "b": 1}}', "body_json"),
        (b'{"user": "\\ud800"}', "body_json"),
        (b'{"user": "\\udc00\\ud800"}', "body_json"),
        (b'{"user": "\xff"}', "body_json"),
        (b'{"user": "\xed\xa0\x80"}', "body_json"),
        (b'{"user": "\xc0\x80"}', "body_json"),
        ('{"user": "a"}'.encode("utf-16"), "body_json"),
        (b'\xef\xbb\xbf{"user": "a"}', "body_json"),
        (b'{"user": "a\\u0000b"}', "body_text"),
        (b'{"metadata": {"a\\u0000": "b"}}', "body_text"),
        (b'{"a": 1,}', "body_json"),
        (b"{'a': 1}", "body_json"),
        (b'{"a": 01}', "body_json"),
        (b'{"a": 1} trailing', "body_json"),
        (b'{"a": "line\nbreak"}', "body_json"),
        (b"[" * 65 + b"]" * 65, "body_depth"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "body_depth"),
        (b"[" * 500_000, "body_json"),
        (b'{"a":' * 500_000, "body_elements"),
        (b"[" + b"0," * 300_000 + b"0]", "body_elements"),
        (b"[" + b"[]," * 900_000 + b"[]]", "body_elements"),
        (b"[" + b"{}," * 900_000 + b"{}]", "body_elements"),
    ],
)
def test_bodies_that_are_refused(body: bytes, reason: str) -> None:
    began = time.perf_counter()
    with pytest.raises(Fault) as refused:
        read_body(body, LIMITS)
    assert refused.value.reason == reason
    assert time.perf_counter() - began < 5  # a bound against hanging, not a measure


def test_long_texts_are_no_elements() -> None:
    """A text of a million commas, brackets and quotes is one value."""
    text = ',[{"\\' * 400_000
    assert read_body(json.dumps({"prompt": text}).encode(), LIMITS) == {"prompt": text}


def test_short_texts_take_no_more_room_than_the_body() -> None:
    """Cut at its quotes it would be millions of pieces."""
    body = b"[" + b'"ab",' * 1_000_000 + b'""]'
    tracemalloc.start()
    with pytest.raises(Fault) as refused:
        read_body(body, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.reason == "body_elements" and peak < 8 * len(body)


def test_depth_is_counted_from_the_outside() -> None:
    assert read_body(b"[" * 64 + b"]" * 64, LIMITS)
    with pytest.raises(Fault, match="deeper than 8"):
        read_body(b"[" * 9 + b"]" * 9, InputSettings(max_depth=8))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [PICTURE] * 3}]},
        {"messages": [{"role": "user", "content": [PICTURE]}] * 3},
        {"messages": [[{"role": "user", "content": [PICTURE]}]] * 3},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}] * 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}] * 3}]},
        {"messages": [{"role": "user", "parts": [{"image": {"data": b"x"}}] * 3}]},
        {"messages": [{"role": "user", "content": [{"image_url": "x"}] * 3}]},
    ],
)
def test_pictures_are_counted_in_every_shape(body: Any) -> None:
    with pytest.raises(Fault, match="more than 2 pictures") as refused:
        check_tree(body, SMALL)
    assert refused.value.reason == "image_count"


def test_a_schema_is_no_picture() -> None:
    """Tools may well have a property `image_url`, and one `uuid` beside it."""
    properties = {"image_url": {"type": "string"}, "uuid": {"type": "string"}}
    function = {"name": "show", "parameters": {"type": "object", "properties": properties}}
    body = {"tools": [{"type": "function", "function": function}] * 5, "text": {"format": {"properties": properties}}}
    check_tree(body, SMALL)
    check_tree({"metadata": {"image_url": "x", "uuid": "y"}, "messages": []}, SMALL)


def test_names_of_others_pictures_and_tensors_are_refused() -> None:
    """Both would be answered from what another client sent."""
    nothing = [{kind: None, "uuid": "x"} for kind in ("image_url", "image_pil", "image_embeds", "video_url")]
    for part in ({**PICTURE, "uuid": "x"}, {"type": "image_url", "image_url": None, "uuid": "x"}, *nothing):
        with pytest.raises(Fault) as refused:
            check_tree({"messages": [{"role": "user", "content": [part]}]}, SMALL)
        assert (refused.value.reason, refused.value.param) == ("media_uuid", "messages.0.content.0")
    with pytest.raises(Fault, match="tensors"):
        check_tree({"features": {"mm_hashes": {"image": ["x"]}, "mm_placeholders": {}}}, SMALL)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "hi", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "hi", "video_url": "data:image/png;base64,AAAA"},
        {"type": "refusal", "refusal": "no", "audio_url": {"url": "noria-blob:"}},
        {**PICTURE, "video_url": {"url": "data:image/png;base64,AAAA"}},
    ],
)
def test_a_part_that_is_two_things_is_refused(part: Any) -> None:
    """The engine would read the text, and capture keep a picture that nobody has looked at."""
    with pytest.raises(Fault) as refused:
        check_tree({"messages": [{"role": "user", "content": [part]}]}, SMALL)
    assert (refused.value.reason, refused.value.param) == ("media_kind", "messages.0.content.0")
    check_tree({"documents": [part], "messages": [{"role": "user", "content": [PICTURE]}]}, SMALL)


def test_parts_of_one_kind_pass() -> None:
    url = PICTURE["image_url"]
    text = {"type": "text", "text": "hi", "audio_url": None, "video_url": None}  # as some clients write all fields
    parts = [text, {"image_url": url}, {"type": "input_image", "image_url": url}]
    check_tree({"messages": [{"role": "user", "content": parts}]}, SMALL)


def test_places() -> None:
    url = PICTURE["image_url"]["url"]  # type: ignore[index]
    body = {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": ["x", PICTURE]}]}
    assert place_of(body, url) == "messages.1.content.1.image_url.url"
    anthropic = {"messages": [{"content": [{"type": "image", "source": {"data": "AAAA"}}]}]}
    assert place_of(anthropic, url) == "messages.0.content.0.source.data"
    assert place_of({"messages": []}, url) is None
    assert dotted(("a\nb", "\x1b[31m" + "k" * 100, 3)) == "a?b.?[31m" + "k" * 59 + ".3"
    assert dotted(()) == "body"
