"""A small engine for the contract suite: it answers at once, by a rule, and captures into the real store.

Comes in: OpenAI chat bodies. Goes out: what vLLM's handler would give.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from noria.errors import InvalidRequest, NotFound
from noria.records import Json, image_references
from serve.access.limits.load import Meter, current_ticket
from serve.api.chat import begin_trace
from serve.capture.chat import storage_fault
from serve.capture.queue import CaptureQueue
from serve.capture.tape import Captured, ChoiceTape
from serve.engine.versions import Trace, VersionGate, current_trace
from serve.input.intake import current_intake
from serve.input.media import MediaDoor


class ChatBody(BaseModel):
    """The part of a chat request that the fake acts on; the rest is kept as it is, as vLLM keeps it."""

    model_config = ConfigDict(extra="allow")

    messages: list[Json]
    model: str | None = None
    n: int | None = 1
    temperature: float | None = None
    seed: int | None = None
    stream: bool | None = False
    logprobs: bool | None = False


class FakeChat:
    """A ChatBackend whose choices are five words drawn from the hash of prompt, seed and index.

    With `ignore_eos` a stream never ends by itself.
    """

    def __init__(self, gate: VersionGate, capture: CaptureQueue, door: MediaDoor) -> None:
        self._gate = gate
        self._capture = capture
        self._door = door

    async def chat(self, request: Json) -> Json:
        """The whole answer."""
        trace = begin_trace(streaming=False)
        try:
            return await self.answer(parsed(request))
        finally:
            self._gate.finish(trace)

    async def stream(self, request: Json) -> AsyncGenerator[Json, None]:
        """The answer word by word."""
        trace = begin_trace(streaming=True)
        options = {**request.get("stream_options", {}), "include_usage": True}
        body = parsed({**request, "stream": True, "stream_options": options})
        try:
            async with aclosing(self.chunks(body)) as chunks:
                async for one in chunks:
                    yield one
        finally:
            self._gate.finish(trace)

    async def answer(self, body: ChatBody) -> Json:
        """The whole answer, captured."""
        trace = _trace()
        await self.look(body.messages)
        with Meter(current_ticket.get(), body) as meter:
            return await self._answered(body, trace, meter)

    async def _answered(self, body: ChatBody, trace: Trace, meter: Meter) -> Json:
        await self._gate.admit(trace)
        try:
            head = _head(body, trace, "chat.completion")
            texts = _texts(body)
            meter.take(_output(body, [text.count(" ") + 1 for text in texts]))
            choices = [_choice(body, index, text) for index, text in enumerate(texts)]
            answer = {**head, "choices": choices, "usage": _usage(body, texts)}
            self._keep(body, head["id"], trace, texts)
            return answer
        finally:
            self._gate.release(trace)

    async def chunks(self, body: ChatBody) -> AsyncGenerator[Json, None]:
        """The answer in chunks, captured at its end or where it was broken off."""
        trace = _trace()
        trace.streaming = True
        await self.look(body.messages)
        asked = SimpleNamespace(n=body.n, output_kind=SimpleNamespace(name="DELTA"))
        with Meter(current_ticket.get(), asked) as meter:
            async with aclosing(self._chunks(body, trace, meter)) as chunks:
                async for one in chunks:
                    yield one

    async def _chunks(self, body: ChatBody, trace: Trace, meter: Meter) -> AsyncGenerator[Json, None]:
        await self._gate.admit(trace)
        head = _head(body, trace, "chat.completion.chunk")
        texts, said, finished = _texts(body), [""] * (body.n or 1), False
        try:
            for index in range(len(texts)):
                yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""}, None)]}
            endless = bool((body.model_extra or {}).get("ignore_eos"))
            for index, text in enumerate(texts):
                for piece, reason in _pieces(text, endless):
                    await asyncio.sleep(0)
                    said[index] += piece
                    meter.take(_output(body, [1 if at == index else 0 for at in range(len(texts))]))
                    yield {**head, "choices": [_delta(index, {"content": piece}, reason)]}
            finished = True
            yield {**head, "choices": [], "usage": _usage(body, texts)}
        finally:
            self._keep(body, head["id"], trace, said, finished=finished)
            self._gate.release(trace)

    async def look(self, messages: list[Json]) -> None:
        """Takes the pictures in by the door that vLLM's connector uses."""
        for reference in image_references(messages):
            await self._door.admit(reference)

    def _keep(self, body: ChatBody, id_: str, trace: Trace, texts: list[str], finished: bool = True) -> None:
        if (body.model_extra or {}).get("store") is False:
            return
        tapes = {i: ChoiceTape(i, token_ids=[1, 2], texts=[text], finish_reason="stop") for i, text in enumerate(texts)}
        captured = Captured(id_, time.time(), "noria", body, trace, [3], tapes, finished=finished)
        intake = current_intake.get()
        captured.replaced = intake.replaced if intake else {}
        self._capture.offer(captured)


def parsed(request: Json) -> ChatBody:
    """The body. Raises InvalidRequest, NotFound (another model)."""
    try:
        body = ChatBody.model_validate(request)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(first["msg"], param=".".join(["body", *map(str, first["loc"])])) from error
    if body.model not in (None, "noria"):
        raise NotFound(f"The model `{body.model}` does not exist.", param="model")
    if (body.temperature or 0) < 0:
        raise InvalidRequest(f"temperature must be non-negative, got {body.temperature}.", param="temperature")
    wrong = storage_fault(body.model_extra or {})
    if wrong is not None:
        raise InvalidRequest(wrong[1], param=wrong[0])
    return body


def _trace() -> Trace:
    trace = current_trace.get()
    if trace is None:
        raise RuntimeError("the door made no trace")
    return trace


def _head(body: ChatBody, trace: Trace, kind: str) -> Json:
    id_ = f"chatcmpl-{uuid.uuid4().hex}"
    made = {"id": id_, "object": kind, "created": int(time.time()), "model": "noria"}
    return {**made, "system_fingerprint": trace.fingerprint}


def _texts(body: ChatBody) -> list[str]:
    asked = json.dumps([body.messages, body.seed], sort_keys=True)
    digests = (hashlib.sha256(f"{asked}{index}".encode()).hexdigest() for index in range(body.n or 1))
    return [" ".join(digest[at : at + 4] for at in range(0, 20, 4)) for digest in digests]


def _pieces(text: str, endless: bool) -> Iterator[tuple[str, str | None]]:
    words = text.split(" ")
    for at, word in enumerate(words):
        yield (word if at == 0 else f" {word}"), ("stop" if at == len(words) - 1 and not endless else None)
    while endless:
        yield " on", None


def _choice(body: ChatBody, index: int, text: str) -> Json:
    token = {"token": text[:4], "logprob": -0.5, "bytes": list(text[:4].encode()), "top_logprobs": []}
    message = {"role": "assistant", "content": text}
    return {
        "index": index,
        "message": message,
        "finish_reason": "stop",
        "logprobs": {"content": [token]} if body.logprobs else None,
    }


def _delta(index: int, delta: Json, reason: str | None) -> Json:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}


def _output(body: ChatBody, tokens: list[int]) -> Any:
    """So many tokens of each choice, as vLLM's engine gives them."""
    parts = [SimpleNamespace(index=index, token_ids=[0] * count) for index, count in enumerate(tokens)]
    return SimpleNamespace(prompt_token_ids=[0] * len(json.dumps(body.messages)), outputs=parts)


def _usage(body: ChatBody, texts: list[str]) -> Json:
    prompt, completion = len(json.dumps(body.messages)), sum(len(text.split(" ")) for text in texts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def server_sent(chunks: AsyncGenerator[Json, None]) -> AsyncIterator[str]:
    async with aclosing(chunks):
        async for one in chunks:
            yield f"data: {json.dumps(one)}\n\n"
    yield "data: [DONE]\n\n"
