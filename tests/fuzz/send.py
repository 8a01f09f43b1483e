"""Sends malformed requests to a running server and notes how each is answered.

Comes in: the addresses of both wires, cases. Goes out: a `Tally`. A case fails the server when it is answered with
a status that means a bug (HTTP 5xx but 501 and 503; gRPC INTERNAL, UNKNOWN), with an error that is no JSON object
with a message, or not at all within the limit.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from tests.fuzz.cases import Case, GrpcCase, HttpCase, RawCase

CONNECTIONS = 8
ENDED_WHILE_SENDING = "Internal error from Core"  # grpc.aio of itself, when the server has ended what it still sends
BUGS = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "no answer", "unclear")
HONEST_5XX = (501, 503)
ENDED = (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError)
SHOWN = 20


@dataclass
class Tally:
    """How many of each kind were answered how; `failures` are the first few that fail the server.

    `gave_way` are groups of samples that had no answer in time: they stand behind users by design, and here are users
    all the time. They are to be sent again when nobody else is there.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    slowest_s: float = 0.0
    gave_way: list[Case] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Requests sent."""
        return sum(sum(one.values()) for one in self.counts.values())

    def note(self, case: Case, status: str, took_s: float, why: str = "") -> None:
        """Counts one answer."""
        wire = {HttpCase: "http", GrpcCase: "grpc"}.get(type(case), "raw")
        self.counts[f"{wire}: {case.kind}"][status] += 1
        self.slowest_s = max(self.slowest_s, took_s)
        if why:
            self.failed += 1
            if len(self.failures) < SHOWN:
                self.failures.append(f"{status}: {why}\n  {_short(case)}")


class Sender:
    """Both wires of one server, called by a few connections at once."""

    def __init__(self, url: str, address: str, *, limit_s: float, api_key: str | None = None) -> None:
        """`limit_s` is how long one answer may take."""
        self._limit_s = limit_s
        self._url, self._address = httpx.URL(url), address
        self._key = f"Bearer {api_key}" if api_key else None

    async def send(self, cases: Iterable[Case], tally: Tally, *, alone: bool = False) -> None:
        """Sends them all, `alone` one after the other; returns when each is answered or given up."""
        left = iter(cases)
        headers = {"authorization": self._key} if self._key else {}
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=self._limit_s, headers=headers) as http,
            grpc.aio.insecure_channel(self._address) as channel,
        ):

            async def one_by_one() -> None:
                for case in left:
                    await self._one(case, http, channel, tally, alone)

            await asyncio.gather(*(one_by_one() for _ in range(1 if alone else CONNECTIONS)))

    async def _one(self, case: Case, http: httpx.AsyncClient, channel: Any, tally: Tally, alone: bool) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._limit_s):
                if isinstance(case, HttpCase):
                    status, why = await _ask_http(http, case)
                elif isinstance(case, GrpcCase):
                    status, why = await self._ask_grpc(channel, case)
                else:
                    status, why = await self._ask_raw(case)
        except (TimeoutError, httpx.TimeoutException):
            status, why = "no answer", f"nothing within {self._limit_s:g} s"
            if in_background(case) and not alone:
                status, why = "gave way", ""
                tally.gave_way.append(case)
        except ENDED:  # the server ended the connection, as it may when the client sends nonsense
            status, why = "closed", ""
        except httpx.TransportError as error:
            status, why = "no answer", repr(error)
        tally.note(case, status, time.monotonic() - began, why)

    async def _ask_grpc(self, channel: Any, case: GrpcCase) -> tuple[str, str]:
        metadata = (("authorization", self._key),) if self._key else ()
        options: Any = {"timeout": self._limit_s, "metadata": metadata}
        try:
            if case.method.endswith("/PutAdapter"):
                await channel.stream_unary(case.method)(iter(case.messages), **options)
            elif case.method.endswith(("/StreamChatCompletion", "/WatchJob")):
                async for _ in channel.unary_stream(case.method)(case.messages[0], **options):
                    pass
            else:
                await channel.unary_unary(case.method)(case.messages[0], **options)
        except grpc.aio.AioRpcError as error:
            name = error.code().name
            if case.method.endswith("/PutAdapter") and error.details() == ENDED_WHILE_SENDING:
                return "ended while sending", ""
            return name, (str(error.details()) if name in BUGS else "" if error.details() else "no details")
        return "OK", ""

    async def _ask_raw(self, case: RawCase) -> tuple[str, str]:
        host, port = (self._url.host, self._url.port) if case.wire == "http" else _split(self._address)
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(case.data)
            await writer.drain()
            writer.write_eof()
            said = await reader.read(-1)
        except (ConnectionError, BrokenPipeError):
            return "closed", ""
        finally:
            writer.close()
        if case.wire == "http" and said.startswith(b"HTTP/1.1 "):
            status = said[9:12].decode()
            return status, ("a server error" if status[0] == "5" and int(status) not in HONEST_5XX else "")
        return "closed", ""


def in_background(case: Case) -> bool:
    """Whether it asks for samples."""
    return (isinstance(case, HttpCase) and case.path == "/noria/v1/samples") or (
        isinstance(case, GrpcCase) and case.method.endswith("/SampleGroup")
    )


async def _ask_http(http: httpx.AsyncClient, case: HttpCase) -> tuple[str, str]:
    answer = await http.request(case.method, case.path, content=case.body, headers=case.headers)
    status = answer.status_code
    if status >= 500 and status not in HONEST_5XX:
        return str(status), answer.text[:300]
    if status >= 400 and not _says_what(answer):
        return "unclear", f"{status}: {answer.text[:300]!r}"
    return str(status), ""


def _says_what(answer: httpx.Response) -> bool:
    """Whether the error is an object with a message, OpenAI's or the framework's for an unknown path."""
    try:
        body = json.loads(answer.content)
    except ValueError:
        return False
    if not isinstance(body, dict):
        return False
    error = body.get("error")
    return bool(error.get("message")) if isinstance(error, dict) else bool(body.get("detail"))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _short(case: Case) -> str:
    text = repr(case)
    return text if len(text) < 600 else f"{text[:400]} ... {text[-150:]}"
