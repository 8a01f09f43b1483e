"""The door of gRPC: messages that cannot be read, or hold what HTTP's door refuses, end with INVALID_ARGUMENT.

Comes in: a call's handler. Goes out: the same handler behind the check. Must not import vllm.

gRPC itself answers a message that the parser refuses (broken bytes, more than 100 messages inside each other) with
INTERNAL, as if the server were at fault. A message that is too large it refuses itself, with RESOURCE_EXHAUSTED.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from noria.records import Json
from noria.settings import InputSettings
from serve.api.grpc.calls import abort
from serve.api.grpc.chat_messages import JSON_TEXTS, messages_to_openai
from serve.api.grpc.convert import to_dict
from serve.input.body import read_body
from serve.input.intake import Intake, current_intake
from serve.input.refusals import InputRefused, Refusals
from serve.input.tree import Fault, check_tree

CHECKED = "/noria.v1."
UNCHECKED = "/noria.v1.SamplingService/PutAdapter"  # pieces of a file


class Unreadable:
    """In the place of a message that the parser refused."""


class InputInterceptor(grpc.aio.ServerInterceptor):
    """Checks every message of `noria.v1`."""

    def __init__(self, limits: InputSettings, refusals: Refusals) -> None:
        self._limits, self._refusals = limits, refusals

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The call's own handler, with its message read leniently and then checked."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(CHECKED):
            return handler
        options = {
            "request_deserializer": _lenient(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if details.method == UNCHECKED:
            return grpc.stream_unary_rpc_method_handler(self._stream(handler.stream_unary), **options)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._one(handler.unary_unary), **options)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._many(handler.unary_stream), **options)
        return handler

    def _one(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def checked(request: Any, context: Any) -> Any:
            await self._check(request, context)
            return await behaviour(request, context)

        return checked

    def _many(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Our streaming calls write to the context; one that yields would have to be iterated here."""

        async def checked(request: Any, context: Any) -> Any:
            await self._check(request, context)
            return await behaviour(request, context)

        return checked

    def _stream(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def checked(requests: Any, context: Any) -> Any:
            return await behaviour(self._readable(requests, context), context)

        return checked

    async def _readable(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, Unreadable):
                await abort(context, self._unreadable())
            yield request

    async def _check(self, request: Any, context: Any) -> None:
        if isinstance(request, Unreadable):
            await abort(context, self._unreadable())
        values = to_dict(request)
        try:
            check_tree(values, self._limits)
            _check_texts(values, self._limits)
        except Fault as fault:
            await abort(context, self._refusals.refuse(fault.reason, str(fault), fault.param))
        current_intake.set(Intake(lambda: _as_on_http(request, values)))

    def _unreadable(self) -> InputRefused:
        said = "the message cannot be read: it is broken, or nests deeper than protobuf reads (100 messages)"
        return self._refusals.refuse("body_protobuf", said, "body")


def _check_texts(values: Json, limits: InputSettings) -> None:
    """What JSON texts hold goes where an HTTP body's values go: the same is let in. Raises Fault."""
    for name in (f"{field}_json" for field in JSON_TEXTS if f"{field}_json" in values):
        try:
            read_body(values[name].encode(), limits)
        except Fault as fault:
            raise Fault(fault.reason, f"{name}: {fault}", (name,)) from fault


def _as_on_http(request: Any, values: Json) -> Json:
    """The values with the conversation as HTTP's bodies have it: a place has one name on both wires."""
    return {**values, "messages": messages_to_openai(request.messages)} if "messages" in values else values


def _lenient(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def lenient(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return Unreadable()

    return lenient
