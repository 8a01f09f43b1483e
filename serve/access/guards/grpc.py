"""The gRPC door: who is calling, and whether their key's roles allow the method.

Comes in: a call's details. Goes out: the method's handler, run as the caller; or a refusal. Must not import vllm.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from noria.errors import NoriaError
from noria.settings import DoorSettings
from serve.access.caller import Caller, current_caller, current_wire
from serve.access.keys import Access
from serve.access.roles import OPEN_METHODS, grpc_roles
from serve.api.grpc.calls import refusing_unread
from serve.wires.arrival import Arrivals

PROBES, PROBE_S = 8, 5.0  # a probe's message comes with its head


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call in as its caller, or ends it with UNAUTHENTICATED, PERMISSION_DENIED or UNAVAILABLE."""

    def __init__(self, access: Access, doors: DoorSettings) -> None:
        """Callers' messages have their time and number; strangers, who may only probe, have a bound of their own."""
        self._access = access
        self._probes = Arrivals(PROBES, PROBE_S, grace_s=0.0)
        self._messages = Arrivals(doors.messages, doors.message_s)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler to run."""
        if details.method.startswith(OPEN_METHODS):
            return self._probes.soon(await continuation(details))
        header = dict(details.invocation_metadata).get("authorization")
        try:
            caller = await self._access.admit(header, grpc_roles(details.method))
        except NoriaError as error:
            return refusing_unread(error)
        _enter(caller)  # interceptors behind this one are run in this very task
        return _as_caller(self._messages.soon(await continuation(details)), caller)


def _enter(caller: Caller) -> None:
    """Makes the caller current for the rest of the task, which is the call's own."""
    current_caller.set(caller)
    current_wire.set("grpc")


def _as_caller(handler: Any, caller: Caller) -> Any:
    """The same handler with its caller current inside, whichever task gRPC runs it in. None (no such method) stays."""
    if handler is None:
        return None
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    run = getattr(handler, kind)
    wrapped = _generator(run, caller) if inspect.isasyncgenfunction(run) else _coroutine(run, caller)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _coroutine(run: Any, caller: Caller) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        _enter(caller)
        return await run(request, context)

    return answer


def _generator(run: Any, caller: Caller) -> Any:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        _enter(caller)
        async for one in run(request, context):
            yield one

    return answer
