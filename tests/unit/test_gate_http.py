"""What stands between HTTP and the engine: the trace, the header, the proxy. No engine runs here."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.engine.middleware import TraceMiddleware
from serve.engine.proxy import EngineProxy
from serve.engine.signed import Signed, adopt, follow_models
from serve.engine.versions import ServingVersion, Trace, VersionGate, current_trace

V1 = ServingVersion("v1", "v1-00000001", Path("v1"))
V2 = ServingVersion("v2", "v2-00000002", Path("v2"))


@dataclass
class FakeEngine:
    """Gives three outputs a request; `external_req_ids` holds those that still run, as vLLM's processor does."""

    logprobs: list[int | None] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    name: str = "engine"

    @property
    def output_processor(self) -> Any:
        """Where vLLM keeps what runs."""
        return SimpleNamespace(external_req_ids=self.running)

    async def generate(self, prompt: str, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """Three outputs, the last one finished."""
        self.logprobs.append(sampling_params.logprobs)
        self.running[request_id].append(request_id)
        try:
            for number in range(3):
                await asyncio.sleep(0)
                if number == 2:
                    self.running.pop(request_id, None)
                yield SimpleNamespace(finished=number == 2, text=f"{prompt}{number}")
        finally:
            if self.running.pop(request_id, None):
                self.aborted.append(request_id)


def params(logprobs: int | None = None) -> Any:
    return SimpleNamespace(logprobs=logprobs)


async def test_the_proxy_admits_and_releases() -> None:
    engine, gate = FakeEngine(), VersionGate(V1)
    proxy = EngineProxy(engine, gate)
    assert proxy.name == "engine"
    inside = []
    async for output in proxy.generate("a", params(), "r1"):
        inside.append((output.text, gate.in_flight))
    assert inside == [("a0", 1), ("a1", 1), ("a2", 0)]  # the last output frees the way already
    assert gate.in_flight == 0


async def test_log_probabilities_are_asked_for_where_capture_wants_them() -> None:
    engine, gate = FakeEngine(), VersionGate(V1)
    proxy = EngineProxy(engine, gate)
    for wanted, given in ((True, None), (True, 5), (False, None)):
        current_trace.set(Trace(streaming=True, logprobs=wanted))
        async for _ in proxy.generate("a", params(given), "r"):
            pass
    assert engine.logprobs == [0, 5, None]


async def test_a_client_that_leaves_frees_its_place_and_the_engine_aborts() -> None:
    engine, gate = FakeEngine(), VersionGate(V1)
    outputs = EngineProxy(engine, gate).generate("a", params(), "r1")
    await anext(outputs)
    assert gate.in_flight == 1
    await outputs.aclose()
    assert gate.in_flight == 0 and engine.aborted == ["r1"]


async def test_a_slow_reader_does_not_hold_a_swap_up() -> None:
    engine, gate = FakeEngine(), VersionGate(V1)
    outputs = EngineProxy(engine, gate).generate("a", params(), "r1")
    await anext(outputs)
    engine.running.clear()  # the engine is done with it; the reader has taken one output of three
    async with gate.exclusive(5):
        gate.set_current(V2)
    assert [output.text async for output in outputs] == ["a1", "a2"]
    assert gate.in_flight == 0 and gate.current == V2


def application(gate: VersionGate, engine: FakeEngine) -> Any:
    """Two routes that use the engine as vLLM's handlers do."""
    proxy = EngineProxy(engine, gate)

    async def text(prompt: str) -> AsyncIterator[str]:
        async for output in proxy.generate(prompt, params(), prompt):
            yield output.text

    async def whole(request: Request) -> Response:
        prompt = (await request.body()).decode()
        if prompt == "bad":
            return JSONResponse({"error": {}}, status_code=400)
        return Response("".join([piece async for piece in text(prompt)]))

    async def stream(request: Request) -> Response:
        prompt = (await request.body()).decode()

        async def events() -> AsyncIterator[str]:
            yield ": waiting\n\n"
            async for piece in text(prompt):
                yield f"data: {piece}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    routes = [
        Route("/v1/completions", whole, methods=["POST"]),
        Route("/v1/chat/completions", stream, methods=["POST"]),
        Route("/health", lambda _: Response("ok"), methods=["GET"]),
    ]
    return TraceMiddleware(Starlette(routes=routes), gate)


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://noria")


async def test_every_answer_names_the_version_that_gave_it() -> None:
    gate, engine = VersionGate(V1), FakeEngine()
    async with client(application(gate, engine)) as http:
        whole = await http.post("/v1/completions", content="a")
        assert (whole.text, whole.headers["x-noria-model-version"]) == ("a0a1a2", "v1")
        async with gate.exclusive(1):
            waiting = asyncio.create_task(http.post("/v1/chat/completions", content="b"))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            gate.set_current(V2)
        stream = await waiting
        assert stream.headers["x-noria-model-version"] == "v2" and stream.text.endswith("data: b2\n\n")
        refused = await http.post("/v1/completions", content="bad")
        assert refused.status_code == 400 and "x-noria-model-version" not in refused.headers
    assert gate.in_flight == 0


class Serving:
    """Something with a fingerprint of its own, as vLLM's handlers have."""

    def __init__(self) -> None:
        self.system_fingerprint: str | None = "vllm-0.31"


def test_an_adopted_handler_signs_with_the_request_s_version() -> None:
    gate, serving = VersionGate(V1), Serving()
    adopt(serving, Signed, noria_gate=gate)
    assert serving.system_fingerprint == "v1-00000001" and isinstance(serving, Serving)
    token = current_trace.set(Trace(version=V2))
    try:
        signer: Any = serving
        assert signer.sign_chunk('data: {"id":"x"}\n\n') == 'data: {"system_fingerprint":"v2-00000002","id":"x"}\n\n'
        quoting = 'data: {"text":"\\"system_fingerprint\\":"}\n\n'
        assert signer.sign_chunk(quoting).startswith('data: {"system_fingerprint":"v2-00000002",')
        for untouched in ("data: [DONE]\n\n", 'data: {"error":{}}\n\n', ": ping\n\n"):
            assert signer.sign_chunk(untouched) == untouched
    finally:
        current_trace.reset(token)


async def test_the_list_of_models_follows_a_swap() -> None:
    @dataclass
    class ModelPath:
        name: str
        model_path: str

    paths = [ModelPath("noria", "/models/v1/serving")]
    models = SimpleNamespace(base_model_paths=paths, registry=SimpleNamespace(base_model_paths=paths))
    gate = VersionGate(V1)
    follow_models(models, "noria", gate)
    assert [(path.name, path.model_path) for path in paths] == [("noria", "v1"), ("v1", "v1")]
    async with gate.exclusive(1):
        gate.set_current(V2)
    assert [(path.name, path.model_path) for path in paths] == [("noria", "v2"), ("v2", "v2")]


async def test_a_request_cut_off_at_shutdown_is_told_to_come_back() -> None:
    began, sent = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        began.set()
        await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    for path, statuses in (("/waits", [503]), ("/begun", [200])):
        began.clear()
        sent.clear()
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        task = asyncio.create_task(TraceMiddleware(app, VersionGate(V1))(scope, receive, send))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [message["status"] for message in sent if "status" in message] == statuses
        assert (b"shutting down" in sent[-1]["body"]) == (path == "/waits")
