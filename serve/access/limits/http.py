"""The limits at the HTTP door.

Comes in and goes out: ASGI messages. Pure ASGI, so that streams pass untouched, and refusals leave before a byte of
body is asked for. Must not import vllm or grpc.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from noria.errors import NoriaError
from serve.access.caller import Caller, current_caller
from serve.access.limits.limits import Limits
from serve.access.limits.load import BodyHold, Ticket, current_ticket
from serve.access.roles import OPEN_PATHS
from serve.api.errors import error_response

NOT_THE_ENGINE = re.compile(
    r"/noria/"  # Noria's own: judgements have a limit of their own, sampling has its turns
    r"|/ping$"
    r"|/v1/responses/[^/]+/cancel$"  # takes load away
    r"|/v1/chat/completions/chatcmpl-[^/]+$"  # the metadata of a stored completion
)
STREAMED_UPLOADS = "/noria/v1/adapters/"  # go to the disk piece by piece


def asks_engine(method: str, path: str) -> bool:
    """Whether the request costs the engine or its tokenizer: every POST, but for those known to do neither."""
    return method == "POST" and NOT_THE_ENGINE.match(path) is None


class LimitsMiddleware:
    """Lets requests in as far as the current caller's limits and the server's go; stands inside of whoever finds the
    caller out."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 429 or 503 in OpenAI's shape."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        caller = current_caller.get()
        sized = _Sized(scope, receive, self._limits)
        ticket: Ticket | None = None
        try:
            sized.open()
            if scope["type"] == "websocket" or asks_engine(scope["method"], scope["path"]):
                ticket = self._limits.enter(caller)
        except NoriaError as error:
            sized.close()
            await self._refuse(error, caller, scope, receive, send)
            return
        answer = _Answer(send, [] if ticket is None else self._limits.headers(caller), sized)
        token = current_ticket.set(ticket)
        try:
            await self.app(scope, sized, answer)
        except ClientDisconnect:
            if sized.fault is None:
                raise
        finally:
            current_ticket.reset(token)
            sized.close()
            if ticket is not None:
                ticket.leave()
        if sized.fault is not None and not answer.begun:
            await self._refuse(sized.fault, caller, scope, receive, send)

    async def _refuse(self, error: NoriaError, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": error.code})  # try again later
            return
        response = error_response(error)
        if asks_engine(scope["method"], scope["path"]):
            response.raw_headers.extend(self._limits.headers(caller))
        await response(scope, receive, send)


class _Sized:
    """`receive` of one request, its body counted against what the server holds."""

    def __init__(self, scope: Scope, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._hold: BodyHold | None = None
        self._read = 0
        self._awaited = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if scope["type"] == "http" and (scope["path"].startswith(STREAMED_UPLOADS) or scope["path"] in OPEN_PATHS):
            self._awaited = False
        self._length = Headers(scope=scope).get("content-length", "") if self._awaited else ""
        self.fault: NoriaError | None = None

    def open(self) -> None:
        """Takes room for the body, as long as it says it is. Raises Unavailable or InvalidRequest."""
        if self._awaited:
            self._hold = self._limits.body()
            self._grow(int(self._length) if self._length.isdecimal() else 0)
            if self.fault is not None:
                raise self.fault

    def close(self) -> None:
        """Gives the room back."""
        if self._hold is not None:
            self._hold.leave()

    async def __call__(self) -> Message:
        """The next message. Where the body cannot go on it ends the request: what the app answers then is not sent."""
        message = await self._receive()
        if not self._awaited or self.fault is not None:
            return message
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._awaited = False
        self._read += len(message.get("body", b""))
        self._grow(self._read)
        return {"type": "http.disconnect"} if self.fault is not None else message

    def _grow(self, size: int) -> None:
        fault = self._hold.grow(size) if self._hold is not None else None
        if fault is not None:
            self.fault = self._limits.refuse("body_bytes", fault)


class _Answer:
    """`send` of one request: names what is left to the caller, and is silent where the body's fault is the answer."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], sized: _Sized) -> None:
        self._send, self._headers, self._sized = send, headers, sized
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if self._sized.fault is not None and not self.begun:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            if self._headers:
                message["headers"] = [*message["headers"], *self._headers]
        await self._send(message)
