"""Messages of gRPC calls: who is waited for, how long, and who gives way. No gRPC runs here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from serve.wires.arrival import Arrivals


class Ended(Exception):
    """What `abort` does to a call."""


class Context:
    """Keeps the status that the call ended with."""

    def __init__(self) -> None:
        self.code: Any = None

    async def abort(self, code: Any, details: str, trailing_metadata: Any) -> None:
        """As grpc.aio's."""
        self.code, self.details = code, details
        raise Ended


def over(arrivals: Arrivals) -> Any:
    """A method that gives its message back, with the bound before it."""

    async def echo(request: Any, context: Any) -> Any:
        return request

    return arrivals.soon(grpc.unary_unary_rpc_method_handler(echo)).stream_unary


async def never(ending: asyncio.Event | None = None) -> AsyncIterator[str]:
    """A message that does not come, from a stream that takes a while to end, and says when it begins to."""
    try:
        await asyncio.sleep(60)
    finally:
        if ending is not None:
            ending.set()
        await asyncio.sleep(0.1)
    yield ""


async def one(said: str) -> AsyncIterator[str]:
    yield said


async def test_a_message_that_does_not_come_is_given_up() -> None:
    context = Context()
    with pytest.raises(Ended):
        await over(Arrivals(1, 0.05))(never(), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT and "doors.message_s" in context.details


async def test_a_call_without_a_message_is_given_up() -> None:
    async def nothing() -> AsyncIterator[str]:
        return
        yield ""

    context = Context()
    with pytest.raises(Ended):
        await over(Arrivals(1, 5.0))(nothing(), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_oldest_gives_way_where_others_wait() -> None:
    """Long before its own time; those who are not in the way are let be."""
    method, context = over(Arrivals(2, 60.0, grace_s=0.05)), Context()
    oldest, younger = (asyncio.create_task(method(never(), context)) for _ in range(2))
    await asyncio.sleep(0.01)
    assert await asyncio.wait_for(method(one("b"), Context()), 5) == "b"
    with pytest.raises(Ended):
        await oldest
    assert not younger.done()
    younger.cancel()
    await asyncio.gather(younger, return_exceptions=True)


async def test_a_call_may_come_while_the_oldest_is_just_being_given_up() -> None:
    """Its time is over and its stream has not ended yet: there is nothing to hurry, and the call is not to blame."""
    method, ending = over(Arrivals(1, 0.05)), asyncio.Event()
    slow = asyncio.create_task(method(never(ending), Context()))
    await ending.wait()
    assert await asyncio.wait_for(method(one("b"), Context()), 5) == "b"
    with pytest.raises(Ended):
        await slow


def test_what_takes_a_stream_stays_as_it_is() -> None:
    handler = SimpleNamespace(request_streaming=True)

    async def made() -> Arrivals:
        return Arrivals(1, 1.0)

    arrivals = asyncio.run(made())
    assert arrivals.soon(handler) is handler and arrivals.soon(None) is None
