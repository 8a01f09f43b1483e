"""Malformed gRPC calls: bytes that are no message, messages that are nearly right, frames that break off.

Comes in: the descriptors of `noria.v1`. Goes out: strategies of `GrpcCase` and `RawCase`.
"""

from __future__ import annotations

import math
from typing import Any

from google.protobuf import message_factory, struct_pb2
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from noria.v1 import feedback_pb2, inference_pb2, operator_pb2, sampling_pb2
from tests.fuzz.cases import COMPLETION, GrpcCase, RawCase

FILES = (inference_pb2, feedback_pb2, operator_pb2, sampling_pb2)
METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
MOST_DEPTH = 4
UNKNOWN = (b"\xc2\x3e\x03abc", b"\xc0\x3e\x01", b"\xc1\x3e" + b"\x00" * 8, b"\xc3\x3e\xc4\x3e", b"\xc3\x3e")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS_FRAME = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

odd_texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(("", "v1", "noria", "user", "chosen", COMPLETION, "\x00", "../..", "\u202e", "a" * 5000)),
)
SCALARS: dict[int, SearchStrategy[Any]] = {
    1: st.one_of(st.floats(), st.sampled_from((math.nan, math.inf, 0.0, 1.0, 1e308))),  # double
    3: st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from((0, 1, -1, 2**63 - 1))),  # int64
    5: st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from((0, 1, 2, -1, 2**31 - 1))),  # int32
    8: st.booleans(),
    9: odd_texts,
    12: st.one_of(st.binary(max_size=60), st.just(b"\x89PNG\r\n\x1a\n" + b"\x00" * 20)),
}
odd_json: SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), SCALARS[1], odd_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def messages(draw: st.DrawFn, descriptor: Any, depth: int = 0) -> Any:
    """A message of that type whose fields hold whatever they can hold."""
    message = message_factory.GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Struct":
        message.update(draw(st.dictionaries(odd_texts, odd_json, max_size=3)))
        return message
    if descriptor.full_name == "google.protobuf.Value":
        message.CopyFrom(_value(draw(odd_json)))
        return message
    fields = descriptor.fields_by_name
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=8, unique=True)) if fields else ():
        _fill(draw, message, fields[name], depth)
    return message


def _fill(draw: st.DrawFn, message: Any, field: Any, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, field.name).update(draw(st.dictionaries(odd_texts, odd_texts, max_size=3)))
    elif field.message_type is not None:
        if depth >= MOST_DEPTH:
            return
        for _ in range(draw(st.integers(0, 2)) if field.is_repeated else 1):
            inner = draw(messages(field.message_type, depth + 1))
            place = getattr(message, field.name)
            (place.add() if field.is_repeated else place).CopyFrom(inner)
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(SCALARS[field.type], max_size=3)))
    else:
        setattr(message, field.name, draw(SCALARS[field.type]))


def _value(plain: Any) -> Any:
    holder = struct_pb2.Struct()
    holder.update({"value": plain})
    return holder.fields["value"]


@st.composite
def calls(draw: st.DrawFn) -> GrpcCase:
    """A call of any method, its message random, valid, mutated, or nested as deep as bytes can."""
    name = draw(st.sampled_from(sorted(METHODS)))
    descriptor = METHODS[name].input_type
    kind = draw(st.sampled_from(("valid", "valid", "flipped", "cut off", "unknown fields", "random bytes", "nested")))
    if METHODS[name].client_streaming:
        several = draw(st.lists(messages(descriptor), max_size=3))
        pieces = [_mutated(draw, kind, one.SerializeToString()) for one in several]
        return GrpcCase(f"{kind} stream", name, tuple(pieces))
    if kind == "nested":
        return GrpcCase(kind, *_nested(draw))
    whole = draw(messages(descriptor)).SerializeToString()
    return GrpcCase(kind, name, (_mutated(draw, kind, whole),))


def _mutated(draw: st.DrawFn, kind: str, data: bytes) -> bytes:
    if kind == "random bytes":
        return draw(st.binary(max_size=200))
    if kind == "unknown fields":
        return data + draw(st.sampled_from(UNKNOWN)) * draw(st.integers(1, 50))
    if not data:
        return data
    at = draw(st.integers(0, len(data) - 1))
    if kind == "cut off":
        return data[:at]
    if kind == "flipped":
        return data[:at] + bytes((data[at] ^ (1 << draw(st.integers(0, 7))),)) + data[at + 1 :]
    return data


def _nested(draw: st.DrawFn) -> tuple[str, tuple[bytes, ...]]:
    """A Struct in a Struct, and so on: the parser stops at 100 messages; what is below comes through."""
    depth = draw(st.sampled_from((10, 40, 48, 49, 60, 200, 5_000)))
    value = b"\x1a\x01x"  # string_value "x"
    for _ in range(depth):
        entry = b"\x0a\x01a\x12" + _size(value) + value  # key "a", value
        struct = b"\x0a" + _size(entry) + entry  # fields
        value = b"\x2a" + _size(struct) + struct  # struct_value
    entry = b"\x0a\x01a\x12" + _size(value) + value
    struct = b"\x0a" + _size(entry) + entry
    name, tag = draw(
        st.sampled_from(
            (
                ("/noria.v1.OperatorService/Retrain", b"\x12"),
                ("/noria.v1.InferenceService/CreateChatCompletion", b"\x9a\x01"),
                ("/noria.v1.InferenceService/StreamChatCompletion", b"\x6a"),
            )
        )
    )
    return name, (tag + _size(struct) + struct,)


def _size(data: bytes) -> bytes:
    """The length as a varint."""
    left, out = len(data), b""
    while left > 0x7F:
        out += bytes((left & 0x7F | 0x80,))
        left >>= 7
    return out + bytes((left,))


@st.composite
def broken_frames(draw: st.DrawFn) -> RawCase:
    """What is no HTTP/2, or breaks off in the middle of it."""
    kind = draw(st.sampled_from(("cut", "frame", "bytes")))
    if kind == "cut":
        whole = PREFACE + SETTINGS_FRAME
        return RawCase("http/2 cut off", "grpc", whole[: draw(st.integers(1, len(whole)))])
    if kind == "frame":
        length, type_, flags = draw(st.integers(0, 2**24 - 1)), draw(st.integers(0, 255)), draw(st.integers(0, 255))
        stream, payload = draw(st.integers(0, 2**32 - 1)), draw(st.binary(max_size=100))
        frame = length.to_bytes(3, "big") + bytes((type_, flags)) + stream.to_bytes(4, "big") + payload
        return RawCase("http/2 frame", "grpc", PREFACE + SETTINGS_FRAME + frame)
    return RawCase("http/2 bytes", "grpc", draw(st.binary(min_size=1, max_size=300)))


grpc_cases: SearchStrategy[GrpcCase] = calls()
