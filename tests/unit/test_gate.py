"""The version gate: nobody is refused, nobody changes version on the way, a swap waits for those inside."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from noria.errors import Unavailable
from serve.engine.versions import ServingVersion, Trace, VersionGate

V1 = ServingVersion("v1", "v1-00000001", Path("v1"))
V2 = ServingVersion("v2", "v2-00000002", Path("v2"))


def test_a_request_is_bound_to_the_version_it_began_with() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        old = Trace("a", streaming=True)
        assert await gate.admit(old) == V1
        order: list[str] = []

        async def swap() -> None:
            async with gate.exclusive(5):
                order.append("swap")
                gate.set_current(V2)

        async def late() -> ServingVersion:
            version = await gate.admit(Trace("b", streaming=True))
            order.append("late")
            return version

        swapping = asyncio.create_task(swap())
        await asyncio.sleep(0)
        queued = asyncio.create_task(late())
        await asyncio.sleep(0.01)
        assert gate.closed and gate.in_flight == 1 and order == []
        assert await gate.admit(old) == V1  # a second prompt of a request that is inside
        gate.release(old)
        assert order == []
        gate.release(old)
        assert await queued == V2
        await swapping
        assert order == ["swap", "late"]
        assert old.version == V1 and old.fingerprint == "v1-00000001"

    asyncio.run(scenario())


def test_a_request_that_does_not_stream_keeps_its_place_until_it_is_over() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        trace = Trace("a")
        for _ in range(3):  # the steps of a beam search
            assert await gate.admit(trace) == V1
            gate.release(trace)
            assert gate.in_flight == 1
        gate.finish(trace)
        gate.finish(trace)
        assert gate.in_flight == 0 and trace.held == 0

    asyncio.run(scenario())


def test_prompts_of_one_request_that_queue_together_enter_together() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        trace = Trace("a", streaming=True)
        async with gate.exclusive(1):
            waiting = [asyncio.create_task(gate.admit(trace)) for _ in range(3)]
            await asyncio.sleep(0)
            assert gate.in_flight == 0
            gate.set_current(V2)
        assert await asyncio.gather(*waiting) == [V2, V2, V2]
        assert gate.in_flight == 1 and trace.held == 3

    asyncio.run(scenario())


def test_a_swap_gives_up_after_its_wait_and_traffic_goes_on() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        trace = Trace("a", streaming=True)
        await gate.admit(trace)
        with pytest.raises(Unavailable) as caught:
            async with gate.exclusive(0.01):
                raise AssertionError("must not get here")
        assert caught.value.code == "drain_timeout" and "1 requests" in caught.value.message
        assert not gate.closed
        assert await gate.admit(Trace("b")) == V1

    asyncio.run(scenario())


def test_a_waiting_request_that_is_cancelled_leaves_no_trace() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        trace = Trace("a")
        async with gate.exclusive(1):
            waiting = asyncio.create_task(gate.admit(trace))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert gate.in_flight == 0 and trace.held == 0 and trace.version is None

    asyncio.run(scenario())


def test_the_gate_opens_again_when_a_swap_fails() -> None:
    async def scenario() -> None:
        gate = VersionGate(V1)
        with pytest.raises(ValueError, match="bad weights"):
            async with gate.exclusive(1):
                raise ValueError("bad weights")
        assert not gate.closed and gate.current == V1
        with pytest.raises(RuntimeError):
            gate.set_current(V2)

    asyncio.run(scenario())
