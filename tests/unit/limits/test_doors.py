"""Both doors ask for the limits of whoever calls, and one key's use is nothing to another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from noria.settings import KeyLimits, LimitSettings
from noria.v1 import inference_pb2, inference_pb2_grpc
from serve.access.caller import Caller, current_caller
from serve.access.limits.grpc import LimitsInterceptor
from serve.access.limits.http import LimitsMiddleware
from serve.access.limits.limits import Limits
from serve.access.limits.load import current_ticket
from serve.api.grpc.calls import answering


def named(name: str) -> Caller:
    """The caller whose key that is."""
    return Caller(f"key_{name}", name, frozenset({"client"}))


class Naming(grpc.aio.ServerInterceptor):
    """Takes whoever calls at their word."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Sets the caller for the call's task."""
        current_caller.set(named(dict(details.invocation_metadata)["key"]))
        return await continuation(details)


class Slow(inference_pb2_grpc.InferenceServiceServicer):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.inside = 0

    async def CreateChatCompletion(self, request: Any, context: Any) -> Any:
        """Says who called."""
        async with answering(context, "x"):
            self.inside += 1
            try:
                await self.go_on.wait()
                return inference_pb2.ChatCompletion(id=current_caller.get().name)
            finally:
                self.inside -= 1


@asynccontextmanager
async def serving(limits: Limits, servicer: Slow) -> AsyncIterator[Any]:
    """A stub of a server behind the limits."""
    server = grpc.aio.server(interceptors=[Naming(), LimitsInterceptor(limits)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)
    await server.stop(1)


async def until(condition: Any) -> None:
    """Returns when it is true."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def asked(stub: Any, key: str) -> Any:
    """A call of that key's."""
    return stub.CreateChatCompletion(inference_pb2.CreateChatCompletionRequest(), metadata=(("key", key),), timeout=20)


async def test_over_grpc_each_key_has_its_own() -> None:
    """One that is full says nothing of another; a call that is cancelled gives its place back."""
    limits = Limits(LimitSettings(concurrent_requests=1, keys={"big": KeyLimits(concurrent_requests=2)}), 4)
    servicer = Slow()
    async with serving(limits, servicer) as stub:
        calls = [asked(stub, "a"), asked(stub, "big"), asked(stub, "big")]
        await until(lambda: servicer.inside == 3)
        for key in ("a", "big"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asked(stub, key)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(refused.value.trailing_metadata())["retry-after"] == "1"
        calls[1].cancel()
        await until(lambda: servicer.inside == 2)
        calls[1] = asked(stub, "big")
        servicer.go_on.set()
        assert [(await one).id for one in calls] == ["a", "big", "big"]
    assert limits.load.demand == limits.load.body_bytes == 0


async def test_a_race_past_the_first_look_is_refused_by_the_second() -> None:
    """Many calls at once are looked at before any of them has its place."""
    limits = Limits(LimitSettings(requests_per_minute=5), 4)
    servicer = Slow()
    servicer.go_on.set()
    async with serving(limits, servicer) as stub:
        said = await asyncio.gather(*(asked(stub, "a") for _ in range(40)), return_exceptions=True)
    assert sum(not isinstance(one, BaseException) for one in said) == 5
    refused = [one for one in said if isinstance(one, grpc.aio.AioRpcError)]
    assert {one.code() for one in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED} and len(refused) == 35
    assert limits.refused["requests_per_minute"] == 35


async def test_over_http_each_key_has_its_own() -> None:
    """By the caller that is current when the request reaches the limits."""
    limits = Limits(LimitSettings(requests_per_minute=1), 4)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert current_ticket.get() is not None and limits.load.demand == 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    limited = LimitsMiddleware(app, limits)

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        current_caller.set(named(dict(scope["headers"])[b"key"].decode()))
        await limited(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://x") as client:
        statuses = [(await client.post("/v1/completions", headers={"key": key})).status_code for key in "abab"]
        assert statuses == [200, 200, 429, 429]
        answer = await client.post("/v1/completions", headers={"key": "a"})
        assert answer.json()["error"]["type"] == "rate_limit_error" and answer.headers["retry-after"] == "60"
    assert limits.load.demand == 0


async def test_a_websocket_takes_a_place_and_is_told_to_come_back() -> None:
    """vLLM's realtime route counts as a request for as long as it is open."""
    limits = Limits(LimitSettings(concurrent_requests=1), 4)
    leave = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await leave.wait()

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    limited, scope = LimitsMiddleware(app, limits), {"type": "websocket", "path": "/v1/realtime", "headers": []}
    first = asyncio.create_task(limited(scope, receive, send))
    await until(lambda: limits.load.demand == 1)
    await limited(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1013, "reason": "rate_limit_exceeded"}]
    leave.set()
    await first
    assert limits.load.demand == 0
