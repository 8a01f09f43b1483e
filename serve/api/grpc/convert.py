"""Messages to dicts and back, for everything but the chat messages (those are in `chat_messages`).

Comes in: protobuf messages of `noria.v1`, or the handlers' dicts. Goes out: the other of the two.
The messages' field names are the HTTP bodies' keys, so that no table is needed. Must not import vllm or fastapi.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from google.protobuf import json_format, struct_pb2

from noria.errors import InvalidRequest
from noria.records import Json

M = TypeVar("M")
EXACT = 2**53  # whole numbers below it are themselves in a double


def to_dict(message: Any) -> Json:
    """The fields that are set, by name. What the caller left out is absent, not a default: the handlers decide."""
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_message(one) for one in value]
    return _message(value)


def _message(value: Any) -> Any:
    if isinstance(value, struct_pb2.Struct):
        return {key: plain(one) for key, one in value.fields.items()}
    if isinstance(value, struct_pb2.Value):
        return plain(value)
    return to_dict(value)


def plain(value: Any) -> Any:
    """A `google.protobuf.Value` as JSON has it; numbers without a fraction become int, as in a JSON text."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _message(value.struct_value)
    if kind == "list_value":
        return [plain(one) for one in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < EXACT else number
    if kind in (None, "null_value"):
        return None
    return getattr(value, kind)


def refuse_inexact(value: Any, where: str) -> None:
    """Raises InvalidRequest for numbers that a Struct cannot hold: the caller's may have been another one."""
    if isinstance(value, float) and (not math.isfinite(value) or abs(value) >= EXACT):
        raise InvalidRequest(
            f"{where}: {value:g} is beyond what a Struct's numbers hold exactly; send JSON text instead "
            f"({where.partition('.')[0]}_json)",
            param=where,
        )
    if isinstance(value, dict):
        for key, one in value.items():
            refuse_inexact(one, f"{where}.{key}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            refuse_inexact(one, f"{where}.{index}")


def fill(kind: type[M], values: Json) -> M:
    """A message from a handler's dict. None is left unset; a key without a field is HTTP's alone and left out."""
    message: M = json_format.ParseDict(values, kind(), ignore_unknown_fields=True)
    return message
