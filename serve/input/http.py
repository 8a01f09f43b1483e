"""The door of HTTP: a body is measured while it is read, and looked over before any route sees it.

Comes in and goes out: ASGI messages. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import jiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from noria.errors import NoriaError, TooLarge
from noria.settings import InputSettings
from serve.access.roles import OPEN_PATHS
from serve.api.errors import error_response
from serve.input.body import read_body
from serve.input.intake import Intake, current_intake
from serve.input.refusals import Refusals
from serve.input.tree import Fault

WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
READ_ON_S = 5.0
OURS = "/noria/v1/"
UPLOADS = "/noria/v1/adapters/"  # an upload is a stream with a limit of its own, checked where it is read


class InputMiddleware:
    """Refuses bodies that are too large (413) or not what JSON may be here (400), in OpenAI's shape."""

    def __init__(self, app: ASGIApp, limits: InputSettings, refusals: Refusals) -> None:
        self.app = app
        self._limits, self._refusals = limits, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the whole body, looks at it, and hands it on in one piece."""
        if scope["type"] == "http" and ("\0" in scope["path"] or b"%00" in scope["query_string"]):
            refused = self._refusals.refuse("url_text", "the URL holds a NUL", "url")
            await _answer(refused, scope, receive, send)
            return
        upload = scope["type"] == "http" and scope["method"] == "PUT" and scope["path"].startswith(UPLOADS)
        if scope["type"] != "http" or scope["method"] not in WITH_BODY or upload or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            body = await self._read(headers, receive)
            if body is None:  # the client left
                return
            self._check(scope["path"], headers.get("content-type", ""), body)
        except NoriaError as error:
            if isinstance(error, TooLarge):
                await _read_on(receive, self._limits.max_body_bytes)
            await _answer(error, scope, receive, send)
            return
        token = current_intake.set(Intake(lambda: _values(body)))
        try:
            await self.app(scope, _Replay(body, receive), send)
        finally:
            current_intake.reset(token)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body. Raises TooLarge, before the first byte where its length is announced."""
        announced = headers.get("content-length", "0")
        self._check_size(int(announced) if announced.isdecimal() and len(announced) < 20 else 0)
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            self._check_size(size)
            more = message.get("more_body", False)
        return b"".join(pieces)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            self._refusals.count("body_bytes")
            said = f"the body has more than {self._limits.max_body_bytes} bytes (input.max_body_bytes)"
            raise TooLarge(said, param="body")

    def _check(self, path: str, content_type: str, body: bytes) -> None:
        """JSON, and what a route would take for JSON, is looked over; the rest only has its size."""
        kind = content_type.partition(";")[0].strip().lower()
        if not body.strip() or not (not kind or kind.endswith(("/json", "+json")) or path.startswith(OURS)):
            return
        try:
            read_body(body, self._limits)
        except Fault as fault:
            raise self._refusals.refuse(fault.reason, str(fault), fault.param) from fault


def _values(body: bytes) -> Any:
    with contextlib.suppress(ValueError):  # a body of another kind
        return jiter.from_json(body)
    return None


async def _answer(error: NoriaError, scope: Scope, receive: Receive, send: Send) -> None:
    """Tells the error and ends the connection, on which the rest of the body may still be coming."""
    response: Any = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


async def _read_on(receive: Receive, left: int) -> None:
    """Takes some more of a body that was refused: a client that still sends may never see why, were it cut off."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_ON_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Replay:
    """`receive` for the application: the body once, then whatever the client does next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
