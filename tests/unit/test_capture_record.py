"""From what the engine gave to a stored completion: tape, pictures, records."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from noria.blobs import Blobs
from noria.settings import CaptureSettings
from serve.capture.chat import CapturingMessages, storage_fault
from serve.capture.images import decode_data_url, strip_images
from serve.capture.record import prompt_hash, to_completion
from serve.capture.tape import Captured, Tape
from serve.engine.versions import ServingVersion, Trace
from serve.input.intake import Intake, current_intake

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PIXEL_URL = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
SHA256 = hashlib.sha256(PIXEL).hexdigest()


@dataclass
class Entry:
    """One log-probability as vLLM has it."""

    logprob: float


@dataclass
class Part:
    """One choice's share of an output."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Entry]] | None = None
    finish_reason: str | None = None


@dataclass
class Output:
    """One output of the engine."""

    outputs: list[Part]
    prompt_token_ids: list[int] | None = None


@dataclass
class Body:
    """A parsed request."""

    body: dict[str, Any]
    n: int | None = 1
    model_extra: dict[str, Any] = field(default_factory=dict)

    def model_dump(self, **_options: Any) -> dict[str, Any]:
        """The body as it was sent."""
        return self.body


def part(index: int, text: str, token: int, reason: str | None = None) -> Part:
    return Part(index, text, [token], [{token: Entry(-token / 10), 999: Entry(-9.0)}], reason)


def trace() -> Trace:
    return Trace("r", version=ServingVersion("v3", "v3-0a0b0c0d", Path("v3")))


async def played(body: Body, outputs: list[Output], chunks: list[str] | None = None) -> Captured | None:
    async def engine() -> AsyncIterator[Output]:
        for output in outputs:
            yield output

    tape = Tape(Captured("chatcmpl-1", 10.0, "noria", body, trace(), chunks=chunks))
    heard = [output async for output in tape.listen(engine())]
    assert heard == outputs
    return tape.end()


async def test_deltas_of_two_choices_become_one_completion(tmp_path: Path) -> None:
    question = {
        "role": "user",
        "content": [
            {"type": "text", "text": "what?"},
            {"type": "image_url", "image_url": {"url": PIXEL_URL, "detail": "low"}},
        ],
    }
    body = Body(
        {
            "messages": [question],
            "model": "noria",
            "user": "u-1",
            "temperature": 0.5,
            "store": True,
            "metadata": {"k": "v"},
        },
        n=2,
    )
    captured = await played(
        body,
        [
            Output([part(0, "re", 1), part(1, "bl", 2)], [7, 8, 9]),
            Output([part(1, "ue", 3, "stop")]),
            Output([part(0, "d", 4, "length")]),
        ],
    )
    assert captured is not None
    completion = to_completion(captured, Blobs(f"file://{tmp_path}"))
    first, second = completion.choices
    assert (first.text, first.token_ids, first.logprobs, first.finish_reason) == ("red", (1, 4), (-0.1, -0.4), "length")
    assert (second.text, second.token_ids, second.logprobs, second.finish_reason) == (
        "blue",
        (2, 3),
        (-0.2, -0.3),
        "stop",
    )
    assert first.message == {"role": "assistant", "content": "red"}
    assert completion.finished and completion.prompt_token_ids == (7, 8, 9)
    assert completion.usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert (completion.model_version, completion.system_fingerprint) == ("v3", "v3-0a0b0c0d")
    assert (completion.end_user, completion.metadata, completion.params) == ("u-1", {"k": "v"}, {"temperature": 0.5})
    assert completion.messages[0]["content"][1]["image_url"] == {"url": f"noria-blob:{SHA256}", "detail": "low"}
    assert [(image.sha256, image.width, image.height) for image in completion.images] == [(SHA256, 1, 1)]
    assert Blobs(f"file://{tmp_path}").get(SHA256) == PIXEL
    assert completion.ttft_s is not None and completion.duration_s is not None
    assert 0 <= completion.ttft_s <= completion.duration_s


async def test_an_answer_cut_short_is_kept_and_marked(tmp_path: Path) -> None:
    body = Body({"messages": [{"role": "user", "content": "hi"}]})
    captured = await played(body, [Output([part(0, "he", 1)], [7])])
    assert captured is not None
    completion = to_completion(captured, Blobs(f"file://{tmp_path}"))
    assert completion.choices[0].text == "he" and not completion.finished
    aborted = await played(body, [Output([part(0, "he", 1, "abort")], [7])])
    assert aborted is not None and not aborted.finished


async def test_without_an_output_there_is_nothing_to_keep() -> None:
    assert await played(Body({"messages": []}), []) is None


async def test_a_parser_s_tool_calls_are_put_together_from_the_chunks(tmp_path: Path) -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ]
    chunks = ["data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}) + "\n\n" for delta in deltas]
    chunks.append('data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\n')
    body = Body({"messages": [{"role": "user", "content": "hi"}]})
    captured = await played(body, [Output([part(0, '<tool>{"a":1}', 1, "stop")], [7])], chunks)
    assert captured is not None
    choice = to_completion(captured, Blobs(f"file://{tmp_path}")).choices[0]
    assert choice.message["content"] is None and choice.finish_reason == "tool_calls"
    assert choice.message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    ]


async def test_missing_logprobs_are_left_out_whole(tmp_path: Path) -> None:
    body = Body({"messages": [{"role": "user", "content": "hi"}]})
    captured = await played(body, [Output([part(0, "a", 1)], [7]), Output([Part(0, "b", [2], None, "stop")])])
    assert captured is not None
    choice = to_completion(captured, Blobs(f"file://{tmp_path}")).choices[0]
    assert choice.token_ids == (1, 2) and choice.logprobs == ()


def test_prompt_hash_sees_the_question_and_nothing_else() -> None:
    one = [{"role": "user", "content": "hi"}]
    assert prompt_hash(one) == prompt_hash([{"content": "hi", "role": "user"}], [])
    assert prompt_hash(one) != prompt_hash([{"role": "user", "content": "ho"}])
    assert prompt_hash(one) != prompt_hash(one, [{"type": "function"}])


def test_only_data_urls_are_taken_out(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": PIXEL_URL},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}},
        {"image_url": "https://example.org/b.png"},
    ]
    messages, images = strip_images([{"role": "user", "content": parts}], Blobs(f"file://{tmp_path}"))
    kept = messages[0]["content"]
    assert kept[0] == parts[0] and kept[2] == parts[2]
    assert kept[1]["image_url"] == {"url": f"noria-blob:{SHA256}"} and len(images) == 1
    assert kept[3] == {"type": "image_url", **parts[3]}  # vLLM takes it without; who reads it later need not
    assert parts[1]["image_url"] == PIXEL_URL  # the request itself is not touched


def test_data_urls() -> None:
    assert decode_data_url(PIXEL_URL) == (PIXEL, "image/png")
    assert decode_data_url(PIXEL_URL.replace("base64", "BASE64")) == (PIXEL, "image/png")  # as the door reads it
    assert decode_data_url("data:,a%20b") == (b"a b", "application/octet-stream")
    assert decode_data_url("http://x") is None and decode_data_url("data:image/png;base64") is None


def test_store_and_metadata_are_checked() -> None:
    assert storage_fault({"store": True, "metadata": {"a": "b"}}) is None
    assert storage_fault({"store": None, "metadata": None}) is None
    for wrong in ({"store": "yes"}, {"metadata": {"a": 1}}, {"metadata": [1]}, {"metadata": {"k": "x" * 513}}):
        fault = storage_fault(wrong)
        assert fault is not None and fault[0] == next(iter(wrong))


@pytest.mark.parametrize("stored", [True, False, None])
def test_anthropic_s_route_obeys_store_and_knows_who_asks(stored: bool | None) -> None:
    """vLLM's conversion drops both: who said `store: false` would be kept, and could not be forgotten."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    asked = {"model": "noria", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "store": stored}
    bodies = [asked, asked | {"metadata": {"user_id": "u-17"}}, asked | {"user": "u-17", "metadata": None}]
    chat: Any = object.__new__(type("Chat", (CapturingMessages, AnthropicServingMessages), {}))
    chat.noria_settings = CaptureSettings(default=stored is not True)
    chat.noria_capture = object()
    for body, user in zip(bodies, [None, "u-17", "u-17"], strict=True):
        token = current_intake.set(Intake(lambda body=body: body))  # type: ignore[misc]
        request = chat.to_chat_completion_request(AnthropicMessagesRequest.model_validate(body))
        current_intake.reset(token)
        tape = copy_context().run(chat._tape, request, "chatcmpl-1", "noria")  # it begins a trace, which is not ours
        assert (tape is not None) is (stored is not False)
        assert request.model_dump(exclude_unset=True).get("user") == user
