"""Between OpenAI's JSON and the messages of `noria.v1.SamplingService`, on the caller's side.

Comes in: the body of `POST /noria/v1/samples`, or an answer's message. Goes out: the other. Must not import grpc.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from google.protobuf import json_format

from noria.errors import InvalidRequest
from noria.records import Json
from noria.v1 import inference_pb2, sampling_pb2


def sample_request(body: Json) -> Any:
    """The message that says what the body says; a data: URL becomes the picture's bytes. Raises InvalidRequest."""
    rest = {key: value for key, value in body.items() if key != "messages" and value is not None}
    try:
        request = json_format.ParseDict(rest, sampling_pb2.SampleGroupRequest())
    except json_format.ParseError as error:
        raise InvalidRequest(str(error), param="body") from error
    for at, message in enumerate(body.get("messages") or []):
        request.messages.append(_message(message, f"messages.{at}"))
    return request


def as_json(message: Any) -> Json:
    """Every field of the message, unset ones too: empty lists, zeros, and None where presence is told."""
    out: Json = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            out[field.name] = [as_json(one) for one in value] if field.message_type else list(value)
        elif field.has_presence and not message.HasField(field.name):
            out[field.name] = None
        else:
            out[field.name] = as_json(value) if field.message_type else value
    return out


def _message(message: Json, where: str) -> Any:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where}: a message is an object", param=where)
    content = message.get("content")
    out = inference_pb2.ChatMessage(role=str(message.get("role") or ""))
    unknown = sorted(set(message) - {"role", "content", "name", "tool_call_id", "tool_calls"})
    if unknown:
        raise InvalidRequest(f"{where}.{unknown[0]}: gRPC has no such field", param=f"{where}.{unknown[0]}")
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            setattr(out, key, message[key])
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        out.tool_calls.add(id=call.get("id") or "", type=call.get("type") or "function", **function)
    if isinstance(content, str):
        out.content = content
    for at, part in enumerate(content if isinstance(content, list) else []):
        _add_part(out.parts.add(), part, f"{where}.content.{at}")
    return out


def _add_part(out: Any, part: Json, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    shown = part.get(kind) if kind in ("text", "image_url") else None
    if kind == "text" and isinstance(shown, str):
        out.text = shown
    elif kind == "image_url" and isinstance(shown, dict) and isinstance(shown.get("url"), str):
        url = shown["url"]
        if url.startswith("data:"):
            out.image.media_type, out.image.data = _data(url, where)
        else:
            out.image.url = url
        if shown.get("detail") is not None:
            out.image.detail = shown["detail"]
    else:
        raise InvalidRequest(f"{where}: a part is text or image_url, with its text or its url", param=where)


def _data(url: str, where: str) -> tuple[str, bytes]:
    head, comma, text = url.removeprefix("data:").partition(",")
    media_type, _, coding = head.partition(";")
    if not comma or coding != "base64":
        raise InvalidRequest(f"{where}: a picture's data: URL is base64", param=where)
    try:
        return media_type, base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"{where}: the picture is not base64 ({error})", param=where) from error
