"""Clients that hold connections and do nothing useful with them.

Comes in: the addresses of a server. Goes out: how many connections were opened, and how many were told of their end
(one that reads a byte a second learns of it when it has read all that was on its way).
Slow readers take a byte a second; the half-open say nothing, half a head, half a body, half a handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from typing import Any

import grpc
import httpx

from noria.records import Json
from noria.v1 import inference_pb2_grpc
from tests.contract.doors import chat_body, chat_request

SMALL_BYTES = 4096
LONG: Json = {"max_tokens": 150, "n": 4, "logprobs": True, "top_logprobs": 20, "temperature": 1, "store": False}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
HALVES = {
    "http, silent": b"",
    "http, half a head": HEAD,
    "http, half a body": HEAD + b"content-length: 5000\r\n\r\n" + b'{"model": "noria", ',
    "grpc, silent": b"",
    "grpc, half a handshake": b"PRI * HTTP/2.0\r\n\r\nSM",
    "grpc, no settings": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


SLOW = "http, a byte a second"


class Dawdlers:
    """Some of each kind."""

    def __init__(self, url: str, address: str, each: int, hold_s: float) -> None:
        """`hold_s` is how long a gRPC reader takes nothing; it then looks whether its call has been ended."""
        self._hold_s = hold_s
        self._url, self._address, self._each = httpx.URL(url), address, each
        self.opened: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    async def run(self, released: asyncio.Event) -> None:
        """Opens them all and holds them until they are released; `ended` counts those that the server ended before."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            works = [self._half(kind, said) for kind, said in HALVES.items() for _ in range(self._each)]
            works += [self._slow_http() for _ in range(self._each)]
            works += [self._slow_grpc(stub) for _ in range(self._each)]
            tasks = [asyncio.create_task(work) for work in works]
            await released.wait()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):  # a dawdler that could not dawdle shows nothing
                    raise end

    async def told(self, most_s: float) -> None:
        """Returns when all that can be told of their end have been, or after a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while any(self.ended[kind] < n for kind, n in self.opened.items() if kind != SLOW):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)

    async def _half(self, kind: str, said: bytes) -> None:
        address = (self._url.host, self._url.port) if kind.startswith("http") else _split(self._address)
        self.opened[kind] += 1
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(said)
            await _until_closed(reader)
            self.ended[kind] += 1
        finally:
            writer.close()

    async def _slow_http(self) -> None:
        """A byte a second of an answer of some megabytes."""
        kind = SLOW
        self.opened[kind] += 1
        bare = socket.socket()
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
        bare.setblocking(False)
        await asyncio.get_running_loop().sock_connect(bare, (self._url.host, self._url.port))
        reader, writer = await asyncio.open_connection(sock=bare, limit=SMALL_BYTES)
        body = json.dumps({**chat_body("go on", None), **LONG, "ignore_eos": True, "stream": True}).encode()
        try:
            writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            while await _piece(reader, 1):  # noqa: ASYNC110  the slowness is the point
                await asyncio.sleep(1.0)
            self.ended[kind] += 1
        finally:
            writer.close()

    async def _slow_grpc(self, stub: Any) -> None:
        """Reads the first piece of an answer and makes no more room in HTTP/2's window."""
        kind = "grpc, stops reading"
        self.opened[kind] += 1
        call = stub.StreamChatCompletion(chat_request("go on", None, **LONG, extra={"ignore_eos": True}))
        try:
            await call.read()
            await asyncio.sleep(self._hold_s)
            with contextlib.suppress(grpc.aio.AioRpcError):  # UNAVAILABLE, or the whole answer was on its way
                while await call.read() is not grpc.aio.EOF:
                    pass
            self.ended[kind] += 1
        finally:
            call.cancel()


async def _until_closed(reader: asyncio.StreamReader) -> None:
    while await _piece(reader, 4096):
        pass


async def _piece(reader: asyncio.StreamReader, most: int) -> bytes:
    try:
        return await reader.read(most)
    except ConnectionError:
        return b""


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
