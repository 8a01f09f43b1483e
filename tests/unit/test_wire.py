"""Between messages and JSON: what is set stays set, what is not stays absent, and no field is forgotten."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from noria.errors import InvalidRequest, NoriaError, NotFound, Unavailable
from noria.records import Feedback, Job, JobEvent, Json, Preference, Rollout, Side, Version
from noria.v1 import feedback_pb2, inference_pb2, operator_pb2
from serve.api.chat import chunks_of, engine_error
from serve.api.grpc.chat_messages import chunk, completion, recognised, request_to_openai
from serve.api.grpc.convert import fill, to_dict

PREFERENCE = Preference("pref_1", 1.0, "h", Side("c1", 0), Side(text="b"), "chosen", "u", "why")
RECORDS: list[tuple[Json, Any]] = [
    (PREFERENCE.to_wire(), feedback_pb2.Preference),
    (Feedback("fb_1", 1.0, "c1", 0, 5, "up", "e", "c", "u", "pref_1").to_wire(), feedback_pb2.Feedback),
    (Job("job_1", "dpo", "queued", "snapshot", 0.0, 1.0).to_wire(), operator_pb2.Job),
    (JobEvent("job_1", 1, 1.0, "state", {"state": "queued"}).to_wire(), operator_pb2.JobEvent),
    (Version("v1", None, "live", "base", None, 1.0).to_wire(), operator_pb2.Version),
    (Rollout("roll_1", "v2", "v1", "direct", "queued", 1.0).to_wire(), operator_pb2.RolloutState),
]


@pytest.mark.parametrize(("wire", "message"), RECORDS, ids=[one[1].__name__ for one in RECORDS])
def test_every_field_of_the_wire_has_one_in_the_message(wire: Json, message: Any) -> None:
    """`fill` leaves a key without a field out, so that this must hold."""
    assert set(wire) == set(message.DESCRIPTOR.fields_by_name)


def test_set_and_unset_are_told_apart() -> None:
    """An index of 0 is sent; a verdict that was not said is not."""
    request = feedback_pb2.RecordPreferenceRequest(
        chosen=feedback_pb2.Side(completion_id="c1", index=0), rejected=feedback_pb2.Side(text="")
    )
    assert to_dict(request) == {"chosen": {"completion_id": "c1", "index": 0}, "rejected": {"text": ""}}


def test_json_in_a_message_comes_out_as_it_went_in() -> None:
    """Whole numbers are int again, nothing is lost."""
    settings = {"dpo": {"beta": 0.5, "batch_size": 4, "x": None}, "list": [1, "a", True, 2.5], "deep": [[{"y": []}]]}
    request = fill(operator_pb2.RetrainRequest, {"method": "dpo", "settings": settings})
    out = to_dict(request)
    assert out == {"method": "dpo", "settings": settings}
    assert isinstance(out["settings"]["dpo"]["batch_size"], int)


def test_none_is_left_unset() -> None:
    """As absent, not as an empty text."""
    message: Any = fill(operator_pb2.Version, {"id": "v1", "parent": None, "metrics": {"kl": 0.5}, "unknown": 1})
    assert not message.HasField("parent")
    assert to_dict(message) == {"id": "v1", "metrics": {"kl": 0.5}}


def test_a_chat_request_is_the_http_body() -> None:
    """Text and pictures in order, tool calls nested as OpenAI nests them, further fields beside the rest."""
    png = b"\x89PNG\r\n\x1a\n123"
    request = inference_pb2.CreateChatCompletionRequest(model="noria", temperature=0.0, seed=2**60, store=False)
    request.messages.add(role="system", content="be brief")
    user = request.messages.add(role="user")
    user.parts.add().text = "look"
    user.parts.add().image.data = png
    user.parts.add().image.url = "https://example.org/a.png"
    user.parts[2].image.detail = "low"
    request.messages.add(role="assistant").tool_calls.add(id="t1", type="function", name="f", arguments="{}")
    request.messages.add(role="tool", content="3", tool_call_id="t1")
    request.extra.update({"min_p": 0.1})
    request.tool_choice.string_value = "auto"
    body = request_to_openai(request)
    data = base64.b64encode(png).decode()
    assert body == {
        "model": "noria",
        "temperature": 0.0,
        "seed": 2**60,
        "store": False,
        "min_p": 0.1,
        "tool_choice": "auto",
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                    {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
                ],
            },
            {
                "role": "assistant",
                "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "3", "tool_call_id": "t1"},
        ],
    }


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda r: r.extra.update({"temperature": 1}), "extra.temperature"),
        (lambda r: r.extra.update({"stream": True}), "extra.stream"),
        (lambda r: r.messages.add(role="user", content="a").parts.add(text="b"), "messages.0.content"),
        (lambda r: r.messages.add(role="user").parts.add(), "messages.0.parts.0"),
    ],
)
def test_a_contradictory_chat_request_names_the_field(change: Any, param: str) -> None:
    """Before the engine is asked."""
    request = inference_pb2.CreateChatCompletionRequest()
    change(request)
    with pytest.raises(InvalidRequest) as caught:
        request_to_openai(request)
    assert caught.value.param == param


def test_json_texts_keep_order_and_whole_numbers() -> None:
    """What a Struct forgets: a schema's properties are generated in their order."""
    schema = '{"type":"object","properties":{"zeta":{"maximum":9007199254740993},"mid":{},"alpha":{}}}'
    request = inference_pb2.CreateChatCompletionRequest(
        tools_json=f'[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]',
        tool_choice_json='{"type":"function","function":{"name":"f"}}',
        response_format_json=f'{{"type":"json_schema","json_schema":{{"name":"s","schema":{schema}}}}}',
        extra_json='{"logit_bias":{"9":1.5},"min_p":0.25}',
    )
    body = request_to_openai(request)
    for properties in (
        body["tools"][0]["function"]["parameters"]["properties"],
        body["response_format"]["json_schema"]["schema"]["properties"],
    ):
        assert list(properties) == ["zeta", "mid", "alpha"]
        assert properties["zeta"]["maximum"] == 2**53 + 1
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (body["logit_bias"], body["min_p"]) == ({"9": 1.5}, 0.25)
    assert not {key for key in body if key.endswith("_json")}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools_json": "{}"}, "tools_json", "has to be a list"),
        ({"response_format_json": "[]"}, "response_format_json", "has to be an object"),
        ({"extra_json": "{"}, "extra_json", "this is not JSON"),
        ({"extra_json": '{"min_p":NaN}'}, "extra_json", "NaN is no number"),
        ({"extra_json": "[" * 100_000}, "extra_json", "this is not JSON"),
        ({"extra_json": '{"temperature":1}'}, "extra.temperature", "has a field"),
        ({"extra_json": "{}", "extra": {"min_p": 0.5}}, "extra", "give extra or extra_json, not both"),
        ({"response_format": {"a": [{"b": 2.0**53}]}}, "response_format.a.0.b", "response_format_json"),
        ({"extra": {"min_p": float("inf")}}, "extra.min_p", "extra_json"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(fields: Json, param: str, said: str) -> None:
    """Rather than another number, another order, or nothing."""
    request = inference_pb2.CreateChatCompletionRequest(
        **{key: value for key, value in fields.items() if key.endswith("_json")}
    )
    for key, value in fields.items():
        if not key.endswith("_json"):
            getattr(request, key).update(value)
    with pytest.raises(InvalidRequest, match=said) as caught:
        request_to_openai(request)
    assert caught.value.param == param


def test_pictures_are_recognised() -> None:
    """By their first bytes."""
    assert recognised(b"RIFF1234WEBPVP8 ") == "image/webp"
    assert recognised(b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert recognised(b"plain") == ""


def test_an_answer_becomes_a_message() -> None:
    """Tool calls, log-probabilities and the version's name among them."""
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "e", "logprob": -1.0}]}
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = completion(
        {
            "id": "c1",
            "object": "chat.completion",
            "created": 7,
            "model": "noria",
            "system_fingerprint": "v12-1a2b3c4d",
            "usage": {"prompt_tokens": 3, "completion_tokens": None, "total_tokens": 3},
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None, "tool_calls": [call]},
                    "finish_reason": "tool_calls",
                    "logprobs": {"content": [token]},
                }
            ],
        }
    )
    assert message.model_version == "v12"
    choice = message.choices[0]
    assert not choice.message.HasField("content")
    assert (choice.message.tool_calls[0].name, choice.message.tool_calls[0].arguments) == ("f", '{"a":1}')
    assert choice.logprobs.content[0].bytes == "é".encode()
    assert choice.logprobs.content[0].top_logprobs[0].logprob == -1.0
    assert not choice.logprobs.content[0].top_logprobs[0].HasField("bytes")


def test_a_chunk_becomes_a_message() -> None:
    """A last chunk has usage and no choices."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "noria", "system_fingerprint": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = chunk({**head, "choices": [], "usage": usage})
    assert (last.usage.total_tokens, list(last.choices), last.model_version) == (5, [], "")
    piece = chunk({**head, "choices": [{"index": 1, "delta": {"content": "a"}, "finish_reason": None}]})
    assert (piece.choices[0].index, piece.choices[0].delta.content, piece.choices[0].finish_reason) == (1, "a", "")


def test_a_stream_of_events_is_read() -> None:
    """Several chunks in one piece, comments and the end mark; an error in band is raised."""
    assert chunks_of('data: {"id": 1}\n\ndata: {"id": 2}\n\n') == [{"id": 1}, {"id": 2}]
    assert chunks_of(": keep-alive\n\n") == chunks_of("data: [DONE]\n\n") == []
    with pytest.raises(NotFound) as caught:
        chunks_of('data: {"error": {"message": "gone", "type": "NotFoundError", "param": "model", "code": 404}}\n\n')
    assert (caught.value.message, caught.value.param) == ("gone", "model")


@pytest.mark.parametrize(
    ("code", "kind"), [(400, InvalidRequest), (404, NotFound), (503, Unavailable), (500, NoriaError)]
)
def test_the_engines_errors_keep_their_meaning(code: int, kind: type[NoriaError]) -> None:
    """By vLLM's status."""
    error = engine_error({"message": "m", "type": "t", "param": "p", "code": code})
    assert type(error) is kind
    assert (error.message, error.param) == ("m", "p")
