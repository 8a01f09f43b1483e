"""The door of HTTP: how much is read, what is answered, and that the application sees the same bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from noria.settings import InputSettings
from serve.input.http import InputMiddleware
from serve.input.intake import current_intake
from serve.input.refusals import Refusals

LIMITS = InputSettings(max_body_bytes=2000)
JSON = {"content-type": "application/json"}


class Echo:
    """An application that says what it was sent; `bodies` are all that reached it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        if scope["path"] == "/waits":
            self.left = (await receive())["type"] == "http.disconnect"
        intake = current_intake.get()
        said = b"" if intake is None or scope["method"] == "GET" else json.dumps(intake.place("x")).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


@pytest.fixture
async def client(echo: Echo, refusals: Refusals) -> AsyncIterator[httpx.AsyncClient]:
    """A client on the application behind the door."""
    transport = httpx.ASGITransport(app=InputMiddleware(echo, LIMITS, refusals))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as made:
        yield made


async def test_a_good_body_reaches_the_application_as_it_is(client: httpx.AsyncClient, echo: Echo) -> None:
    body = b' {"b": 1.50, "a":"x"}\n'
    answer = await client.post("/v1/chat/completions", content=body, headers=JSON)
    assert echo.bodies == [body] and answer.json() == "a"
    assert current_intake.get() is None


async def test_a_body_without_json_is_only_measured(client: httpx.AsyncClient, echo: Echo) -> None:
    for kind in ("multipart/form-data; boundary=x", "application/octet-stream", "text/plain"):
        assert (await client.post("/v1/files", content=b"\xff{", headers={"content-type": kind})).status_code == 200
    assert echo.bodies == [b"\xff{"] * 3
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/json", "application/problem+json; charset=utf-8", "Application/JSON", None]
)
async def test_what_a_route_may_take_for_json_is_looked_at(
    client: httpx.AsyncClient, echo: Echo, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = await client.post("/v1/chat/completions", content=b'{"a": NaN}', headers=headers)
    assert answer.status_code == 400 and echo.bodies == []


async def test_our_own_routes_read_json_whatever_it_is_called(client: httpx.AsyncClient, refusals: Refusals) -> None:
    answer = await client.post(
        "/noria/v1/preferences", content=b'{"a":1,"a":2}', headers={"content-type": "text/plain"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "body_json")
    assert "duplicate key" in error["message"] and refusals.counts == {"body_json": 1}


async def test_a_nul_in_the_url_reaches_no_route(client: httpx.AsyncClient, echo: Echo) -> None:
    for url in ("/noria/v1/jobs/a%00b", "/v1/chat/completions?metadata[a]=%00"):
        answer = await client.get(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_text")
    assert echo.bodies == []


async def pieces(size: int, sent: list[int]) -> AsyncIterator[bytes]:
    for _ in range(size // 100):
        sent.append(100)
        yield b" " * 100


async def test_a_large_body_is_413(client: httpx.AsyncClient, echo: Echo, refusals: Refusals) -> None:
    """Announced or not."""
    sent: list[int] = []
    for content in (b" " * 2001, pieces(3000, sent)):
        answer = await client.post("/v1/chat/completions", content=content, headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (413, "request_too_large", "body")
        assert "2000 bytes (input.max_body_bytes)" in error["message"] and answer.headers["connection"] == "close"
    assert echo.bodies == [] and refusals.counts == {"body_bytes": 2}


async def test_an_endless_body_is_not_read_to_its_end() -> None:
    """After the limit it takes as much again, for the client to hear why, and no more."""
    sent = 0

    async def receive() -> Message:
        nonlocal sent
        sent += 100
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "query_string": b""}
    await InputMiddleware(Echo(), LIMITS, Refusals())(scope, receive, send)
    assert said[0]["status"] == 413 and sent <= 4200


async def test_a_client_that_leaves_while_it_sends_is_no_request(echo: Echo) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(f"nobody is there for {message}")

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "query_string": b""}
    await InputMiddleware(echo, LIMITS, Refusals())(scope, receive, send)
    assert echo.bodies == []


async def test_a_client_that_leaves_afterwards_is_told_to_the_application(echo: Echo) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        await asyncio.sleep(0)
        return messages.pop(0)

    async def send(message: Message) -> None:
        assert message["type"].startswith("http.response")

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/waits", "headers": [], "query_string": b""}
    await InputMiddleware(echo, LIMITS, Refusals())(scope, receive, send)
    assert echo.left


async def test_an_upload_is_a_stream_with_its_own_limit(client: httpx.AsyncClient, echo: Echo) -> None:
    assert (await client.put("/noria/v1/adapters/a", content=b"\xff" * 5000)).status_code == 200
    assert [len(body) for body in echo.bodies] == [5000]


def test_refusals_are_counted_by_reason() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from serve.input.refusals import export_refusals

    registry = CollectorRegistry()
    refusals = export_refusals(Refusals(), registry)
    for reason in ("image_host", "image_host", "body_json"):
        assert refusals.refuse(reason, "said", "where").code == reason
    assert b'noria_input_refused_total{reason="image_host"} 2.0' in generate_latest(registry)
