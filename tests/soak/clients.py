"""Clients that stream answers one after the other, half of them over each wire.

Comes in: the addresses of a server. Goes out: what each client got, and how long it took. A refusal for overload (429,
503, RESOURCE_EXHAUSTED, UNAVAILABLE) is honest and counted apart; its client waits a little and asks again.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from noria.v1 import inference_pb2_grpc
from tests.contract.doors import chat_body, chat_request

ANSWER_S = 120.0
BACK_S = 0.25
HONEST = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
TOKENS = 16
WIRES = ("http", "grpc")


@dataclass
class Got:
    """What one client got. `latencies_s` are those of whole answers."""

    wire: str
    ids: list[str] = field(default_factory=list)
    tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Crowd:
    """So many clients on one server. `tag` marks their completions in the store.

    Each wire has a process: in one event loop the clients of one wire would wait for those of the other, and we would
    measure ourselves.
    """

    def __init__(self, url: str, address: str, clients: int, tag: str) -> None:
        self._asked = url, address, tag
        self._wires = [(wire, [n for n in range(clients) if n % 2 == odd]) for odd, wire in enumerate(WIRES)]
        self.tag, self.got = tag, [Got(WIRES[number % 2]) for number in range(clients)]

    async def run(self, seconds: float) -> None:
        """Lets them all ask until the time is over; returns when the last answer has come."""
        loop, context = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(WIRES), context) as processes:
            asked = [loop.run_in_executor(processes, _half, *self._asked, *half, seconds) for half in self._wires]
            halves = await asyncio.gather(*asked)
        for (_, numbers), half in zip(self._wires, halves, strict=True):
            for number, got in zip(numbers, half, strict=True):
                self.got[number] = got


def _half(url: str, address: str, tag: str, wire: str, numbers: list[int], seconds: float) -> list[Got]:
    """The clients of one wire, in a process of their own."""
    return asyncio.run(_Half(url, address, tag).run(wire, numbers, seconds))


class _Half:
    def __init__(self, url: str, address: str, tag: str) -> None:
        self._url, self._address, self._tag = url, address, tag

    async def run(self, wire: str, numbers: list[int], seconds: float) -> list[Got]:
        got = [Got(wire) for _ in numbers]
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)  # sooner than the server ends them
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=ANSWER_S, limits=limits) as http,
            grpc.aio.insecure_channel(self._address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            clients = zip(numbers, got, strict=True)
            await asyncio.gather(*(self._client(number, one, http, stub, until) for number, one in clients))
        return got

    async def _client(self, number: int, got: Got, http: httpx.AsyncClient, stub: Any, until: float) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            began, said = time.monotonic(), f"client {number}, question {turn}"
            more = {
                "max_tokens": TOKENS,
                "temperature": 1,
                "seed": number * 100_000 + turn,
                "store": True,
                "metadata": {"soak": self._tag},
            }
            try:
                if got.wire == "http":
                    body = chat_body(said, None, **more, stream=True, stream_options={"include_usage": True})
                    status = await _over_http(http, body, got)
                else:
                    status = await _over_grpc(stub, chat_request(said, None, **more), got)
            except (httpx.HTTPError, TimeoutError) as error:
                status = type(error).__name__
            if status == "ok":
                got.latencies_s.append(time.monotonic() - began)
            elif status in ("429", "503", *HONEST):
                got.refused += 1
                await asyncio.sleep(BACK_S)
            else:
                got.errors[status] += 1
                await asyncio.sleep(BACK_S)


async def _over_http(http: httpx.AsyncClient, body: dict[str, Any], got: Got) -> str:
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return str(answer.status_code)
        id_, tokens, done = "", 0, False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return f"cut off: {chunk['error'].get('code')}"
                id_ = chunk["id"]
                tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    return _noted(got, id_, tokens, done)


async def _over_grpc(stub: Any, request: Any, got: Got) -> str:
    id_, tokens = "", 0
    try:
        async for chunk in stub.StreamChatCompletion(request, timeout=ANSWER_S):
            id_, tokens = chunk.id, chunk.usage.completion_tokens or tokens
    except grpc.aio.AioRpcError as error:
        name = str(error.code().name)
        return f"cut off: {name}" if id_ else name  # once it has begun, no refusal is honest
    return _noted(got, id_, tokens, bool(tokens))


def _noted(got: Got, id_: str, tokens: int, done: bool) -> str:
    if not (id_ and done):
        return "cut off"
    got.ids.append(id_)
    got.tokens += tokens
    return "ok"
