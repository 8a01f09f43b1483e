"""Messages of gRPC calls arrive in time, and few at once; gRPC itself would hold any number of half ones for ever.

Comes in: a method's handler that takes one message. Goes out: the same handler, whose message is asked for when
there is room: what is not asked for stays at its sender, but for HTTP/2's window. Must not import vllm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from noria.errors import InvalidRequest
from serve.api.grpc.calls import abort

GRACE_S = 5.0


class Arrivals:
    """The messages that are being read: at most `at_once`, each for `patience_s` or, while others wait for its place,
    for `GRACE_S`. A message that comes with its head takes a turn or two of the event loop.
    """

    def __init__(self, at_once: int, patience_s: float, grace_s: float = GRACE_S) -> None:
        self._patience_s, self._grace_s = patience_s, min(grace_s, patience_s)
        self._room = asyncio.Semaphore(at_once)
        self._began: dict[asyncio.Timeout, float] = {}  # oldest first; those that are told to hurry are gone

    def soon(self, handler: Any) -> Any:
        """The handler with the bound before it. None (no such method) stays, and so does one that takes a stream."""
        if handler is None or handler.request_streaming:
            return handler
        run = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def answer(requests: Any, context: Any) -> Any:
            try:
                request = await self._message(aiter(requests))
            except (TimeoutError, StopAsyncIteration):
                said = "the message did not come in time: send it with the call's head (doors.message_s)"
                await abort(context, InvalidRequest(said, param="body"))
            return await run(request, context)

        make = getattr(grpc, f"stream_{'stream' if handler.response_streaming else 'unary'}_rpc_method_handler")
        return make(answer, handler.request_deserializer, handler.response_serializer)

    async def _message(self, requests: AsyncIterator[Any]) -> Any:
        if self._room.locked() and self._began:
            oldest, began = next(iter(self._began.items()))
            del self._began[oldest]
            if not oldest.expired():  # else its stream is ending just now
                oldest.reschedule(began + self._grace_s)
        async with self._room:
            async with asyncio.timeout(self._patience_s) as patience:
                self._began[patience] = asyncio.get_running_loop().time()
                try:
                    return await anext(requests)
                finally:
                    self._began.pop(patience, None)
