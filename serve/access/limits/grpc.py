"""The limits at the gRPC door.

Comes in: calls, before their message is read and again once it is there. Goes out: the call, or RESOURCE_EXHAUSTED or
UNAVAILABLE with the trailing metadata `retry-after`. Must not import vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from noria.errors import NoriaError
from serve.access.caller import current_caller
from serve.access.limits.limits import Limits
from serve.access.limits.load import current_ticket
from serve.api.grpc.calls import abort, refusing_unread

ENGINE = "/noria.v1.InferenceService/"
OWN = "/noria.v1."


class LimitsInterceptor(grpc.aio.ServerInterceptor):
    """Stands after whoever finds the caller out.

    A call is turned away before its message is read, where that is known by then. Its place it takes with its message:
    only then does gRPC call us again at its end, whatever that is.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The call's handler with the limits around it, or one that refuses."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming or not details.method.startswith(OWN):
            return handler
        engine = details.method.startswith(ENGINE)
        if engine:
            try:
                self._limits.check(current_caller.get())
            except NoriaError as error:
                return refusing_unread(error)
        if handler.response_streaming:
            return handler._replace(unary_stream=self._around(handler.unary_stream, engine))
        return handler._replace(unary_unary=self._around(handler.unary_unary, engine))

    def _around(self, behaviour: Any, engine: bool) -> Any:
        async def limited(request: Any, context: Any) -> Any:
            try:
                async with self._inside(request, engine):
                    return await behaviour(request, context)
            except _Refused as refused:
                await abort(context, refused.error)

        return limited

    @asynccontextmanager
    async def _inside(self, request: Any, engine: bool) -> AsyncIterator[None]:
        hold = self._limits.body()
        ticket = None
        try:
            try:
                size = getattr(request, "ByteSize", None)  # none where somebody put a mark in an unreadable one's place
                fault = hold.grow(size()) if size is not None else None
                if fault is not None:
                    raise self._limits.refuse("body_bytes", fault)
                if engine:
                    ticket = self._limits.enter(current_caller.get())
            except NoriaError as error:
                raise _Refused(error) from error
            current_ticket.set(ticket)  # the task is the call's own
            yield
        finally:
            hold.leave()
            if ticket is not None:
                ticket.leave()


class _Refused(Exception):
    """Apart from what a handler raises itself."""

    def __init__(self, error: NoriaError) -> None:
        super().__init__(error.message)
        self.error = error
