"""Malformed HTTP requests: bodies that are no JSON, or the wrong JSON, and frames that break off.

Comes in: nothing. Goes out: strategies of `HttpCase` and `RawCase`. Most bodies are nearly right: a body that is wrong
from its first byte on is refused at the first line of code that sees it, and tries no other.
"""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from noria.records import Json
from tests.fuzz.cases import COMPLETION, HttpCase, RawCase

CHAT: Json = {
    "model": "noria",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "which?"}]},
        {"role": "user", "content": "the red one"},
    ],
    "max_tokens": 2,
    "temperature": 1,
    "n": 1,
    "seed": 3,
    "stop": ["x"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 1,
    "store": True,
    "metadata": {"case": "fuzz"},
    "user": "u-fuzz",
}
SIDE: Json = {"completion_id": COMPLETION, "index": 0}
POSTED: dict[str, Json] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "noria", "prompt": "the", "max_tokens": 2, "seed": 1, "echo": False},
    f"/v1/chat/completions/{COMPLETION}": {"metadata": {"a": "b"}},
    "/noria/v1/preferences": {
        "chosen": SIDE,
        "rejected": {**SIDE, "index": 1},
        "verdict": "chosen",
        "annotator": "u-17",
        "comment": "because",
    },
    "/noria/v1/feedback": {**SIDE, "rating": 4, "thumb": "up", "edit": "so", "comment": "why", "annotator": "u-17"},
    "/noria/v1/jobs": {"method": "dpo", "settings": {"dpo": {"beta": 0.1}, "min_pairs": 2}, "rollout": "none"},
    "/noria/v1/rollouts": {"version": "v99", "strategy": "direct"},
    "/noria/v1/samples": {
        "messages": [{"role": "user", "content": "a"}],
        "n": 2,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 2,
        "seed": 5,
        "version": "v1",
    },
}
LISTS = (
    "/noria/v1/preferences",
    "/noria/v1/feedback",
    "/noria/v1/jobs",
    "/noria/v1/versions",
    "/noria/v1/rollouts",
    "/v1/chat/completions",
    f"/v1/chat/completions/{COMPLETION}/messages",
    "/noria/v1/jobs/job_1/events",
)
NAMED = (
    ("GET", "/noria/v1/preferences/"),
    ("DELETE", "/noria/v1/preferences/"),
    ("DELETE", "/noria/v1/feedback/"),
    ("DELETE", "/noria/v1/end_users/"),
    ("GET", "/noria/v1/jobs/"),
    ("GET", "/noria/v1/versions/"),
    ("GET", "/noria/v1/rollouts/"),
    ("GET", "/v1/chat/completions/"),
    ("DELETE", "/v1/chat/completions/"),
    ("DELETE", "/noria/v1/adapters/"),
    ("PUT", "/noria/v1/adapters/"),
)
TYPES = ("application/json", "text/plain", "application/xml", "multipart/form-data; boundary=x", "", "a" * 500,
         "application/json; charset=utf-16", "application/x-protobuf", "application/x-www-form-urlencoded")  # fmt: skip

NUMBERS = (b"9" * 5_000, b"1e999999", b"-1e-999999", b"0x10", b"1_0", b"Infinity", b"-NaN")

odd_texts = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.characters(codec=None), max_size=8),  # halves of surrogate pairs, too
    st.sampled_from(("", "\x00", "\ud800", "\u202e", "%s%n", "../../etc/passwd", "' OR 1=1 --", "{{7*7}}", "a" * 5000)),
)
odd_numbers = st.one_of(
    st.integers(),
    st.sampled_from((-1, 0, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400)),
    st.floats(),
    st.sampled_from((math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0)),
)
odd_values: SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def wrong_types(draw: st.DrawFn) -> HttpCase:
    """A right body of which one to three places hold something else, are missing, or are too many."""
    path, body = draw(st.sampled_from(sorted(POSTED.items())))
    wrong = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = wrong
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(holder[key], dict | list) or draw(st.booleans()):
                break
            holder = holder[key]
        action = draw(st.sampled_from(("change", "change", "change", "remove", "add")))
        if key is None or action == "add":
            if isinstance(holder, dict):
                holder[draw(odd_texts)] = draw(odd_values)
            else:
                holder.append(draw(odd_values))
        elif action == "remove":
            del holder[key]
        else:
            holder[key] = draw(odd_values)
    return posted("wrong types", path, json.dumps(wrong).encode())


@st.composite
def nested(draw: st.DrawFn) -> HttpCase:
    """A field, or the whole body, nested deeper than anybody means."""
    path, body = draw(st.sampled_from(sorted(POSTED.items())))
    depth = draw(st.sampled_from((50, 100, 190, 500, 1_000, 10_000, 100_000)))
    opening, closing = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"))))
    deep = opening * depth + "1" + closing * (depth if draw(st.booleans()) else depth // 2)
    if draw(st.booleans()):
        return posted("deep nesting", path, deep.encode())
    key = draw(st.sampled_from(sorted(body)))
    text = json.dumps({name: one for name, one in body.items() if name != key})
    return posted("deep nesting", path, f'{text[:-1]}, "{key}": {deep}}}'.encode())


@st.composite
def broken_text(draw: st.DrawFn) -> HttpCase:
    """A right body cut off, with a wrong byte, with a key twice, with an impossible number, or binary."""
    path, body = draw(st.sampled_from(sorted(POSTED.items())))
    text = json.dumps(body).encode()
    at = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(("truncated", "invalid UTF-8", "a key twice", "huge number", "surrogate", "binary")))
    if kind == "truncated":
        return posted(kind, path, text[:at])
    if kind == "invalid UTF-8":
        wrong = draw(st.sampled_from((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xef\xbb\xbf")))
        return posted(kind, path, text[:at] + wrong + text[at:])
    if kind == "a key twice":
        key = draw(st.sampled_from(sorted(body)))
        return posted(kind, path, text[:-1] + f', "{key}": {json.dumps(draw(odd_values))}}}'.encode())
    key = draw(st.sampled_from(sorted(body)))
    value = json.dumps(body[key]).encode()
    if kind == "huge number":
        return posted(kind, path, text.replace(value, draw(st.sampled_from(NUMBERS)), 1))
    if kind == "surrogate":
        half = draw(st.sampled_from((b'"\\ud800"', b'"\\udfff\\ud800"', b'"a\\u0000b"', b'"\\uD83D"')))
        return posted(kind, path, text.replace(value, half, 1))
    return posted(kind, path, draw(st.binary(max_size=400)))


@st.composite
def giant(draw: st.DrawFn) -> HttpCase:
    """Keys, texts and lists of a size that nobody means, and content types that do not fit."""
    path, body = draw(st.sampled_from(sorted(POSTED.items())))
    size = draw(st.sampled_from((5_000, 100_000, 500_000)))
    key = draw(st.sampled_from(sorted(body)))
    large: Any = draw(
        st.sampled_from(({"k" * size: 1}, "t" * size, [0] * (size // 10), {str(i): i for i in range(size // 100)}))
    )
    whole = large if draw(st.booleans()) else {**body, key: large}
    return posted("giant", path, json.dumps(whole).encode())


@st.composite
def wrong_type_header(draw: st.DrawFn) -> HttpCase:
    """A right body that is announced as something else, or packed in a way that it is not."""
    path, body = draw(st.sampled_from(sorted(POSTED.items())))
    headers = {"content-type": draw(st.sampled_from(TYPES))}
    if draw(st.booleans()):
        headers["content-encoding"] = draw(st.sampled_from(("gzip", "br", "identity", "x")))
    case = posted("content type", path, json.dumps({**body, "max_tokens": 1}).encode())
    return HttpCase(case.kind, case.method, path, case.body, headers)


@st.composite
def odd_addresses(draw: st.DrawFn) -> HttpCase:
    """Ids, queries and headers that are no such thing."""
    if draw(st.booleans()):
        keys = ("after", "limit", "order", "annotator", "state", "model", "metadata[a]", "metadata", "completion_id")
        pairs = draw(st.lists(st.tuples(st.sampled_from(keys), address_texts), min_size=1, max_size=3))
        query = "&".join(f"{quote(key)}={value}" for key, value in pairs)
        headers = {"last-event-id": str(draw(odd_numbers))[:300]} if draw(st.booleans()) else {}
        return HttpCase("query", "GET", f"{draw(st.sampled_from(LISTS))}?{query}", headers=headers)
    method, path = draw(st.sampled_from(NAMED))
    body = draw(st.binary(max_size=200)) if method == "PUT" else b""
    more = f"?version=v1&ttl_s={draw(address_texts)}" if method == "PUT" else ""
    return HttpCase("path", method, f"{path}{draw(address_texts) or 'x'}{more}", body)


address_texts = st.one_of(
    st.text(max_size=30).map(lambda text: quote(text.encode(errors="replace"), safe="")),
    st.binary(max_size=12).map(lambda data: quote(data, safe="")),
    st.sampled_from(
        ("%00", "%ff", "..%2f..%2fetc", "9" * 30, "9" * 5000, "-1", "1e3", "NaN", "%F0%9F%98%80", "a" * 3000)
    ),
)

HEADS = (
    b"POST /noria/v1/feedback HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 400\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
    b"GET /noria/v1/status HTTP/1.1\r\nhost: a\r\n\r\n",
)
LINES = (b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 200,
         b"GET /" + b"a" * 100_000, b"POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
         b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5_000 + b"\r\n", b"GET / HTTP/1.1\r\nhost : a\r\n\r\n",
         b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\nabc",
         b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n")  # fmt: skip


@st.composite
def broken_frames(draw: st.DrawFn) -> RawCase:
    """What is no HTTP, or breaks off in the middle of it."""
    kind = draw(st.sampled_from(("cut", "line", "chunk", "bytes")))
    head = draw(st.sampled_from(HEADS))
    if kind == "cut":
        return RawCase("http cut off", "http", head[: draw(st.integers(1, len(head)))])
    if kind == "line":
        return RawCase("http line", "http", draw(st.sampled_from(LINES)))
    if kind == "chunk":
        chunk = draw(st.sampled_from((b"zz\r\n", b"ffffffffffffffff\r\n", b"5\r\nab", b"-1\r\n", b"3\r\nabcXX")))
        return RawCase("http chunk", "http", HEADS[1] + chunk)
    return RawCase("http bytes", "http", draw(st.binary(min_size=1, max_size=300)))


def posted(kind: str, path: str, body: bytes) -> HttpCase:
    """The case of a JSON body."""
    return HttpCase(kind, "POST", path, body, {"content-type": "application/json"})


http_cases: SearchStrategy[HttpCase] = st.one_of(
    wrong_types(), wrong_types(), broken_text(), broken_text(), odd_addresses(), nested(), wrong_type_header()
)
