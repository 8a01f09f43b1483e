"""Chat requests and answers between `noria.v1` messages and OpenAI's JSON.

Comes in: CreateChatCompletionRequest, or OpenAI's answer and chunks as dicts. Goes out: the other.
Must not import vllm or fastapi.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from noria.v1 import inference_pb2 as pb
from serve.api.grpc.convert import refuse_inexact, to_dict

JSON_TEXTS = {"tools": list, "tool_choice": object, "response_format": dict, "extra": dict}
"""Fields with a twin `.._json`, and what its text has to hold."""
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)


def request_to_openai(request: Any) -> Json:
    """The body that the same request has on HTTP. Raises InvalidRequest."""
    body = to_dict(request)
    for name, kind in JSON_TEXTS.items():
        refuse_inexact(body.get(name), name)
        text = body.pop(f"{name}_json", None)
        if text is not None:
            if name in body:
                raise InvalidRequest(f"give {name} or {name}_json, not both", param=name)
            body[name] = json_text(text, kind, f"{name}_json")
    extra = body.pop("extra", {})
    for key in extra:
        if key in pb.CreateChatCompletionRequest.DESCRIPTOR.fields_by_name or key in ("stream", "stream_options"):
            raise InvalidRequest(f"extra.{key}: this message has a field or a method for it", param=f"extra.{key}")
    body["messages"] = messages_to_openai(request.messages)
    return {**body, **extra}


def json_text(text: str, kind: type, where: str) -> Any:
    """What a JSON text holds, its keys in order. Raises InvalidRequest where it is no JSON or not of that kind."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: this is not JSON: {error}", param=where) from error
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise InvalidRequest(f"{where}: this has to be {wanted} in JSON", param=where)
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def messages_to_openai(messages: Iterable[Any]) -> list[Json]:
    """The conversation as HTTP's bodies have it, pictures as data: URLs. Raises InvalidRequest."""
    return [_message(one, index) for index, one in enumerate(messages)]


def _message(message: Any, index: int) -> Json:
    where = f"messages.{index}"
    out = to_dict(message)
    parts = out.pop("parts", None)
    if parts is not None:
        if "content" in out:
            raise InvalidRequest(f"{where}: give content or parts, not both", param=f"{where}.content")
        out["content"] = [_part(one, f"{where}.parts.{i}") for i, one in enumerate(message.parts)]
    if "tool_calls" in out:
        out["tool_calls"] = [_tool_call_to_openai(call) for call in out["tool_calls"]]
    return out


def _part(part: Any, where: str) -> Json:
    if part.WhichOneof("part") == "text":
        return {"type": "text", "text": part.text}
    source = part.image.WhichOneof("source")
    if source is None:
        raise InvalidRequest(f"{where}: a part has text, or an image with data or url", param=where)
    image = {"url": part.image.url if source == "url" else data_url(part.image.data, part.image.media_type)}
    if part.image.HasField("detail"):
        image["detail"] = part.image.detail
    return {"type": "image_url", "image_url": image}


def data_url(data: bytes, media_type: str) -> str:
    """The picture as a data: URL, byte for byte; whether it is one is decided where HTTP's are (`serve.input`)."""
    kind = media_type or recognised(data) or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def recognised(data: bytes) -> str:
    """The media type that a picture's first bytes tell, or an empty text."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in MAGIC if data.startswith(magic)), "")


def _tool_call_to_openai(call: Json) -> Json:
    function = {"name": call.get("name", ""), "arguments": call.get("arguments", "")}
    return {"id": call.get("id", ""), "type": call.get("type", "function"), "function": function}


def version_of(answer: Json) -> str:
    """The version that a fingerprint names: `v7` of `v7-1a2b3c4d`."""
    return (answer.get("system_fingerprint") or "").rpartition("-")[0]


def completion(answer: Json) -> Any:
    """OpenAI's answer as a message."""
    choices = [
        pb.Choice(
            index=choice["index"],
            message=_assistant(choice["message"]),
            finish_reason=choice.get("finish_reason") or "",
            logprobs=_logprobs(choice.get("logprobs")),
        )
        for choice in answer["choices"]
    ]
    return pb.ChatCompletion(choices=choices, **_head(answer))


def chunk(answer: Json) -> Any:
    """One of OpenAI's chunks as a message."""
    choices = [
        pb.ChunkChoice(
            index=choice["index"],
            delta=_assistant(choice["delta"]),
            finish_reason=choice.get("finish_reason") or "",
            logprobs=_logprobs(choice.get("logprobs")),
        )
        for choice in answer["choices"]
    ]
    return pb.ChatCompletionChunk(choices=choices, **_head(answer))


def _head(answer: Json) -> Json:
    head = {key: answer[key] for key in ("id", "object", "created", "model")}
    usage = answer.get("usage")
    if usage:
        head["usage"] = pb.Usage(
            **{key: usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        )
    return {**head, "system_fingerprint": answer.get("system_fingerprint") or "", "model_version": version_of(answer)}


def _assistant(message: Json) -> Any:
    calls = [_tool_call(call) for call in message.get("tool_calls") or []]
    texts = {key: message[key] for key in ("content", "reasoning", "refusal") if message.get(key) is not None}
    return pb.AssistantMessage(role=message.get("role") or "", tool_calls=calls, **texts)


def _tool_call(call: Json) -> Any:
    function = call.get("function") or {}
    out = pb.ToolCall(
        id=call.get("id") or "",
        type=call.get("type") or "",
        name=function.get("name") or "",
        arguments=function.get("arguments") or "",
    )
    if call.get("index") is not None:
        out.index = call["index"]
    return out


def _logprobs(logprobs: Json | None) -> Any:
    if not logprobs or logprobs.get("content") is None:
        return None
    return pb.LogProbs(content=[_token(one) for one in logprobs["content"]])


def _token(one: Json) -> Any:
    top = [_token(other) for other in one.get("top_logprobs") or []]
    out = pb.TokenLogProb(token=one["token"], logprob=one["logprob"], top_logprobs=top)
    if one.get("bytes") is not None:
        out.bytes = bytes(one["bytes"])
    return out
