"""Behind the HTTP door: a trace for every request, the version's name on every answer.

Comes in and goes out: ASGI messages. Pure ASGI, so that streams pass untouched. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from noria.errors import Unavailable
from serve.api.errors import error_response
from serve.engine.versions import Trace, VersionGate, current_trace

VERSION_HEADER = b"x-noria-model-version"
ONE_RUN = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages"})  # streams of one engine run each


class TraceMiddleware:
    """Gives each POST its `Trace`, and names the version in the answer's header.

    The head of the answer waits for its first piece of body: a stream's head is ready before the gate has let the
    request in, and only then is the version known.
    """

    def __init__(self, app: ASGIApp, gate: VersionGate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app inside a trace; gives back what the request holds at the gate, however it ends.

        A request that is cancelled before its answer began (the server ends and has waited long enough) is told to
        come back.
        """
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        trace = Trace(request_id=uuid.uuid4().hex)
        token = current_trace.set(trace)
        answer = _Answer(scope["path"], trace, self._gate, send)
        try:
            await self.app(scope, receive, answer)
        except asyncio.CancelledError:
            if not answer.begun:
                await error_response(Unavailable("the server is shutting down: try again"))(scope, receive, send)
            raise
        finally:
            self._gate.finish(trace)
            current_trace.reset(token)


class _Answer:
    """`send` of one request, with the head held back until the version is known."""

    def __init__(self, path: str, trace: Trace, gate: VersionGate, send: Send) -> None:
        self._path, self._trace, self._gate, self._send = path, trace, gate, send
        self._head: Message | None = None
        self._stream = False
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            self._stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            self._trace.streaming = self._stream and self._path in ONE_RUN
            return
        if self._head is not None:
            if self._is_keep_alive(message):
                return
            head, self._head = self._head, None
            if self._trace.version is not None:
                head["headers"] = [*head["headers"], (VERSION_HEADER, self._trace.version.id.encode())]
            if not self._stream:
                self._gate.finish(self._trace)  # the answer is complete: its reader may be slow
            self.begun = True
            await self._send(head)
        await self._send(message)

    def _is_keep_alive(self, message: Message) -> bool:
        """A comment sent while the request still waits at the gate would fix the header too early."""
        return self._stream and self._trace.version is None and message.get("body", b"").startswith(b":")
