"""A small engine for the contract suite: it answers at once, by a rule, and captures into the real store.

Comes in: OpenAI chat bodies. Goes out: what vLLM's handler would give. Store, blobs, gate, capture, handlers, HTTP
router and gRPC server around it are the real ones; `FakeSystem` runs them on one event loop in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from noria.blobs import Blobs
from noria.errors import InvalidRequest, NoriaError, NotFound
from noria.records import Json
from noria.registry import ManifestDraft, Registry, fingerprint
from noria.settings import DoorSettings, Settings
from noria.store import Store
from serve.api.chat import begin_trace
from serve.api.errors import error_response
from serve.api.grpc.server import build_server
from serve.api.handlers import Handlers
from serve.api.http import body_of, build_router
from serve.api.openai.stored import build_stored_router
from serve.capture.chat import storage_fault
from serve.capture.queue import CaptureQueue
from serve.capture.tape import Captured, ChoiceTape
from serve.engine.middleware import KeyMiddleware, TraceMiddleware
from serve.engine.versions import ServingVersion, Trace, VersionGate, current_trace
from serve.sampling.adapters.shelf import AdapterShelf
from serve.sampling.http import build_sampling_router
from serve.sampling.service import Sampling
from serve.sampling.turns import Turns
from serve.wires.patience import Reason, patient
from tests.contract.fake_sampling import FakeSamplingEngine
from tests.unit.sampling.adapters import write_serving


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

    def __init__(self, gate: VersionGate, capture: CaptureQueue) -> None:
        self._gate = gate
        self._capture = capture

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
        await self._gate.admit(trace)
        try:
            head = _head(body, trace, "chat.completion")
            texts = _texts(body)
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
                    yield {**head, "choices": [_delta(index, {"content": piece}, reason)]}
            finished = True
            yield {**head, "choices": [], "usage": _usage(body, texts)}
        finally:
            self._keep(body, head["id"], trace, said, finished=finished)
            self._gate.release(trace)

    def _keep(self, body: ChatBody, id_: str, trace: Trace, texts: list[str], finished: bool = True) -> None:
        if (body.model_extra or {}).get("store") is False:
            return
        tapes = {i: ChoiceTape(i, token_ids=[1, 2], texts=[text], finish_reason="stop") for i, text in enumerate(texts)}
        self._capture.offer(
            Captured(id_, time.time(), "noria", body, trace, prompt_token_ids=[3], choices=tapes, finished=finished)
        )


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


def chat_app(chat: FakeChat, handlers: Handlers, sampling: Sampling, gate: VersionGate, stored: APIRouter) -> Any:
    """The application: `/v1/chat/completions` over the fake, and our own routers."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def create(request: Request) -> Response:
        try:
            body = parsed(await body_of(request))
            if body.stream:
                return StreamingResponse(_lines(chat.chunks(body)), media_type="text/event-stream")
            return JSONResponse(await chat.answer(body))
        except NoriaError as error:
            return error_response(error)

    app.include_router(stored)
    app.include_router(build_sampling_router(sampling, handlers.api_key))
    app.include_router(build_router(handlers))
    traced = TraceMiddleware(app, gate)
    return KeyMiddleware(traced, handlers.api_key) if handlers.api_key else traced


class FakeSystem:
    """Everything of a server but vLLM, listening on two free ports; `adapters` is `engine.policy_adapters`."""

    def __init__(
        self, home: Path, api_key: str | None = None, adapters: int = 2, doors: DoorSettings | None = None
    ) -> None:
        self.home = home
        server = {"api_key": api_key} if api_key else {}
        self._settings = Settings(home=home, server=server, doors=doors or DoorSettings())
        home.mkdir(parents=True, exist_ok=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.http_port = self.grpc_port = 0
        self.chat: FakeChat
        self.gate: VersionGate
        self.sampling: Sampling
        self.engine = FakeSamplingEngine()
        self._adapters = adapters
        self.ended: Counter[Reason] = Counter()

    def start(self) -> None:
        """Returns when both doors are open."""
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the fake system did not start")

    def stop(self) -> None:
        """Closes both doors and what is behind them."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)

    def swap(self, version: ServingVersion) -> None:
        """Has another version serve, in the releaser's order."""

        async def change() -> None:
            async with self.gate.exclusive(10):
                await self.sampling.forget_adapters()
                self.gate.set_current(version)

        asyncio.run_coroutine_threadsafe(change(), self._loop).result(30)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with Store.open(self._settings.store_url) as store:
            registry = Registry(self._settings.models_dir, store)
            version = _first_version(registry)
            gate = self.gate = VersionGate(version)
            blobs = Blobs(self._settings.blobs_url)
            capture = CaptureQueue(store, blobs, self._settings.capture)
            handlers = Handlers(
                store=store, registry=registry, blobs=blobs, gate=gate, capture=capture, settings=self._settings
            )
            self.chat = FakeChat(gate, capture)
            shelf = AdapterShelf(self.engine, gate, self.home / "adapters", most=self._adapters, max_rank=8)
            sampling = self.sampling = Sampling(self.engine, gate, shelf, Turns(4, 1, quiet_s=0.01))
            keeping = asyncio.create_task(sampling.keep())
            rpc, self.grpc_port = await build_server(handlers, self.chat, sampling, host="127.0.0.1", port=0)
            await rpc.start()
            stored = build_stored_router(store, blobs, capture)
            await self._serve_http(chat_app(self.chat, handlers, sampling, gate, stored))
            keeping.cancel()
            await sampling.close()
            await rpc.stop(1)
            await capture.close()

    async def _serve_http(self, app: Any) -> None:
        config = uvicorn.Config(
            app, http=patient(self._settings.doors, self.ended), port=0, log_level="warning", lifespan="off"
        )
        http, listening = uvicorn.Server(config), config.bind_socket()
        listening.listen()
        self.http_port = listening.getsockname()[1]
        task = asyncio.create_task(http.serve(sockets=[listening]))
        self._ready.set()
        await self._stop.wait()
        http.should_exit = True
        await task


def _first_version(registry: Registry) -> ServingVersion:
    staging = registry.begin("fake")
    write_serving(staging / "serving")
    frozen = {"vision_tower": "sha256:00", "aligner": "sha256:01"}
    manifest = registry.publish(staging, ManifestDraft(method="base", metrics={"kl": 0.25}, frozen=frozen))
    registry.promote(manifest.id)
    return ServingVersion(manifest.id, fingerprint(manifest), registry.path(manifest.id) / "serving")


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


def _usage(body: ChatBody, texts: list[str]) -> Json:
    prompt, completion = len(json.dumps(body.messages)), sum(len(text.split(" ")) for text in texts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _lines(chunks: AsyncGenerator[Json, None]) -> AsyncIterator[str]:
    async with aclosing(chunks):
        async for one in chunks:
            yield f"data: {json.dumps(one)}\n\n"
    yield "data: [DONE]\n\n"
