"""Forty requests, each sent over HTTP and over gRPC: the same answer, the same kind of id, the same record, or the
same refusal."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from noria.records import Completion, Json
from noria.v1 import inference_pb2 as pb
from serve.api.grpc.chat_messages import completion
from serve.api.grpc.convert import to_dict
from tests.contract.conftest import System
from tests.contract.doors import HttpDoor, Refused, plain, refused

GREEDY: Json = {"temperature": 0, "max_tokens": 8}
SEEDED: Json = {"temperature": 1, "seed": 11, "max_tokens": 8}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a thing.",
        "parameters": {"type": "object", "properties": {"zeta": {"type": "integer", "minimum": 1}, "alpha": {}}},
    },
}
SCHEMA: Json = {
    "type": "object",
    "properties": {"zeta": {"type": "boolean"}, "mid": {"enum": [1, 2]}, "alpha": {"type": "boolean"}},
    "required": ["zeta", "mid", "alpha"],
    "additionalProperties": False,
}
FORMAT: Json = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
WORDS = [{"role": "user", "content": "what is red?"}]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
CALLED = [
    {"role": "user", "content": "find it"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "look_up", "arguments": '{"zeta": 1}'}}],
    },
    {"role": "tool", "content": "three", "tool_call_id": "t1"},
]


@dataclass
class Case:
    """One request as HTTP's body says it.

    `sent` is what gRPC's message has by another name, `instead` the body's keys that this stands for. `status` and
    `param` are those of a refusal.
    """

    body: Json
    sent: Json = field(default_factory=dict)
    instead: tuple[str, ...] = ()
    stream: bool = False
    status: str | None = None
    param: str | None = None


def said(content: Any, **more: Any) -> Json:
    """A body with one user's message."""
    return {**GREEDY, "messages": [{"role": "user", "content": content}], **more}


CASES: dict[str, Case] = {
    "greedy": Case(said("what is red?")),
    "greedy, streamed": Case(said("what is red?"), stream=True),
    "the served model by name": Case(said("a", model="noria")),
    "a system's message": Case({**GREEDY, "messages": [{"role": "system", "content": "be brief"}, *WORDS]}),
    "a conversation": Case({**GREEDY, "messages": [*WORDS, {"role": "assistant", "content": "a rose"}, *WORDS]}),
    "a speaker's name": Case({**GREEDY, "messages": [{**WORDS[0], "name": "ada"}]}),
    "a seed": Case({**SEEDED, "messages": WORDS}),
    "a seed, streamed": Case({**SEEDED, "messages": WORDS}, stream=True),
    "a seed beyond 2^53": Case({**SEEDED, "messages": WORDS, "seed": 2**53 + 1}),
    "three choices": Case({**SEEDED, "messages": WORDS, "n": 3}),
    "three choices, streamed": Case({**SEEDED, "messages": WORDS, "n": 3}, stream=True),
    "log-probabilities": Case(said("one two", logprobs=True)),
    "log-probabilities, streamed": Case(said("one two", logprobs=True), stream=True),
    "the most probable tokens": Case(said("one two", logprobs=True, top_logprobs=3)),
    "a nucleus": Case({**SEEDED, "messages": WORDS, "top_p": 0.5}),
    "penalties": Case(said("again", frequency_penalty=1.5, presence_penalty=-0.5)),
    "a stop word": Case(said("count", stop=["a", "e"])),
    "one token": Case(said("short", max_tokens=1)),
    "text in parts": Case(said([{"type": "text", "text": "red"}, {"type": "text", "text": "blue"}])),
    "a picture's bytes": Case(said([PICTURE, {"type": "text", "text": "what is it?"}])),
    "a picture's URL": Case(said([{"type": "text", "text": "what is it?"}, PICTURE]), {"url": True}),
    "a picture, streamed": Case(said([PICTURE, {"type": "text", "text": "what is it?"}]), stream=True),
    "a detail": Case(said([{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}])),
    "tools that are not called": Case(said("find it", tools=[TOOL], tool_choice="none")),
    "tools as JSON text": Case(
        said("find it", tools=[TOOL], tool_choice="none"),
        {"tools_json": json.dumps([TOOL]), "tool_choice_json": '"none"'},
        ("tools", "tool_choice"),
    ),
    "a tool's answer": Case({**GREEDY, "messages": CALLED, "tools": [TOOL], "tool_choice": "none"}),
    "structured output, keys in order": Case(
        said("fill it in", response_format=FORMAT, max_tokens=40),
        {"response_format_json": json.dumps(FORMAT)},
        ("response_format",),
    ),
    "a JSON object": Case(said("fill it in", response_format={"type": "text"})),
    "a further parameter": Case(said("again", top_k=5), {"extra": {"top_k": 5}}, ("top_k",)),
    "further parameters as JSON text": Case(
        said("again", top_k=5, min_tokens=2), {"extra_json": '{"top_k": 5, "min_tokens": 2}'}, ("top_k", "min_tokens")
    ),
    "metadata": Case(said("kept", metadata={"case": "40", "ünï": "☃"}, store=True, user="u-40")),
    "metadata, streamed": Case(said("kept", metadata={"case": "41"}, store=True, user="u-40"), stream=True),
    "not stored": Case(said("forget it", store=False, user="u-40")),
    "no such model": Case(said("a", model="nobody"), status="NOT_FOUND", param="model"),
    "no such model, streamed": Case(said("a", model="nobody"), stream=True, status="NOT_FOUND", param="model"),
    "a temperature below 0": Case(said("a", temperature=-1), status="INVALID_ARGUMENT", param="temperature"),
    "metadata that is too long": Case(
        said("a", metadata={"k": "x" * 600}), status="INVALID_ARGUMENT", param="metadata"
    ),
    "metadata that is too long, streamed": Case(
        said("a", metadata={"k" * 65: "x"}), stream=True, status="INVALID_ARGUMENT", param="metadata"
    ),
    "too many pairs of metadata": Case(
        said("a", metadata={str(one): "x" for one in range(17)}), status="INVALID_ARGUMENT", param="metadata"
    ),
    "nothing to sample from": Case(
        said("a", temperature=-0.5, n=2), stream=True, status="INVALID_ARGUMENT", param="temperature"
    ),
}


def test_there_are_forty() -> None:
    """As many as the suite promises."""
    assert len(CASES) == 40


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_same_over_both_wires(system: System, case: Case) -> None:
    """See the module."""
    if case.status is not None:
        http_no, grpc_no = [refusal_of(system, name, case) for name in ("http", "grpc")]
        assert (http_no.status, http_no.param) == (grpc_no.status, grpc_no.param) == (case.status, case.param)
        assert http_no.message == grpc_no.message
        return  # `type` and `code` are vLLM's own words on its HTTP routes, the table's on gRPC
    http, grpc_ = over_http(system, case), over_grpc(system, case)
    ids = [http.pop("id"), grpc_.pop("id")]
    assert [bool(re.fullmatch("chatcmpl-[0-9a-f]+", one)) for one in ids] == [True, True], ids
    assert ids[0] != ids[1]
    assert grpc_ == http
    assert http["model_version"] == "v1"
    records = [record(system, one) for one in ids]
    if case.body.get("store") is False:
        assert records == [None, None]
        return
    assert records[1] == records[0]
    assert records[0] is not None and records[0]["model_version"] == "v1"


def over_http(system: System, case: Case) -> Json:
    """The answer as the message has it, without what differs between two calls."""
    body = {"model": "noria", **case.body}
    if not case.stream:
        answer = system.http.client.post("/v1/chat/completions", json=body)
        answer_check(answer)
        return without_time(to_dict(completion(answer.json())))
    chunks = list(streamed(system.http, body))
    return whole(chunks)


def streamed(door: HttpDoor, body: Json) -> Any:
    """The chunks as messages have them."""
    from serve.api.grpc.chat_messages import chunk

    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with door.client.stream("POST", "/v1/chat/completions", json=asked) as answer:
        if answer.status_code >= 400:
            answer.read()
        answer_check(answer)
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield to_dict(chunk(json.loads(line[6:])))


def over_grpc(system: System, case: Case) -> Json:
    """The same over gRPC."""
    import grpc

    stub = system.grpc.inference
    try:
        if case.stream:
            return whole([to_dict(one) for one in stub.StreamChatCompletion(message(case), timeout=120)])
        return without_time(to_dict(stub.CreateChatCompletion(message(case), timeout=120)))
    except grpc.RpcError as error:
        raise refused(error) from error


def message(case: Case) -> Any:
    """The body as a message: pictures as bytes, or as the URL where the case says so."""
    from google.protobuf import json_format

    body = {key: value for key, value in case.body.items() if key not in ("messages", *case.instead)}
    sent = {key: value for key, value in case.sent.items() if key != "url"}
    request = pb.CreateChatCompletionRequest(model="noria")
    json_format.ParseDict({**body, **sent}, request)
    for one in case.body["messages"]:
        into = request.messages.add(role=one["role"])
        for key in ("name", "tool_call_id"):
            if key in one:
                setattr(into, key, one[key])
        for call in one.get("tool_calls", []):
            into.tool_calls.add(id=call["id"], type=call["type"], **call["function"])
        if isinstance(one["content"], str):
            into.content = one["content"]
            continue
        for part in one["content"]:
            added = into.parts.add()
            if part["type"] == "text":
                added.text = part["text"]
            elif "url" in case.sent:
                added.image.url = part["image_url"]["url"]
            else:
                added.image.data = PNG
            if "detail" in part.get("image_url", {}):
                added.image.detail = part["image_url"]["detail"]
    return request


def whole(chunks: list[Json]) -> Json:
    """A stream joined: each choice's pieces in order, the head that all chunks share, the usage of the last."""
    heads = [{key: one[key] for key in ("id", "model", "system_fingerprint", "model_version")} for one in chunks]
    assert all(head == heads[0] for head in heads)
    choices: dict[int, Json] = {}
    for one in chunks:
        for piece in one.get("choices", []):
            found = choices.setdefault(piece.get("index", 0), {"content": "", "logprobs": [], "finish_reason": None})
            found["content"] += piece.get("delta", {}).get("content") or ""
            found["logprobs"] += piece.get("logprobs", {}).get("content", [])
            found["finish_reason"] = piece.get("finish_reason") or found["finish_reason"]
    return {**heads[0], "choices": choices, "usage": chunks[-1]["usage"]}


def without_time(answer: Json) -> Json:
    """The answer without its second."""
    return {key: value for key, value in answer.items() if key != "created"}


def record(system: System, id_: str) -> Json | None:
    """What the store kept of it, without what differs between two calls; None where it kept nothing."""
    try:
        system.http.feedback({"completion_id": id_, "index": 0, "comment": "seen"})  # waits for the commit
    except Refused as error:
        assert error.status == "NOT_FOUND"
        return None
    with system.store() as store:
        kept = store.get_completion(id_)
    kept_fields = {name: getattr(kept, name) for name in Completion.__dataclass_fields__}
    for name in ("id", "created_at", "ttft_s", "duration_s"):
        kept_fields.pop(name)
    params = {key: value for key, value in kept.params.items() if key not in ("stream", "stream_options")}
    return {**kept_fields, "params": plain(params), "choices": [plain(vars(one)) for one in kept.choices]}


def refusal_of(system: System, name: str, case: Case) -> Refused:
    """What the case is refused with."""
    with pytest.raises(Refused) as caught:
        over_http(system, case) if name == "http" else over_grpc(system, case)
    return caught.value


def answer_check(answer: Any) -> None:
    """Raises Refused as the door does."""
    from tests.contract.doors import _check

    _check(answer)
