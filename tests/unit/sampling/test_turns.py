"""Who may sample: many alone, few beside users, nobody loses a place."""

from __future__ import annotations

import asyncio

from serve.sampling.turns import Turn, Turns


class Holder:
    """A sample that holds its turn, once it is `inside`, until it is told to let go; `log` is what happened."""

    def __init__(self, name: str, turns: Turns, log: list[str], again: bool = False) -> None:
        self.inside = asyncio.Event()
        self.over = asyncio.Event()
        self.turn: Turn | None = None
        self._name, self._turns, self._log, self._again = name, turns, log, again
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._turns.turn(again=self._again) as self.turn:
            self._log.append(f"{self._name} in")
            self.inside.set()
            self.turn.on_stop(lambda: self._log.append(f"{self._name} stopped"))
            await self.over.wait()
        self._log.append(f"{self._name} out")


async def settled() -> None:
    """Lets everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_turns_are_given_in_order_up_to_the_limit() -> None:
    turns = Turns(2, 1)
    log: list[str] = []
    a, b, c, d = [Holder(name, turns, log) for name in "abcd"]
    await settled()
    assert log == ["a in", "b in"] and (turns.running, turns.waiting) == (2, 2)
    b.over.set()
    await settled()
    assert log == ["a in", "b in", "b out", "c in"]
    for one in (a, c, d):
        one.over.set()
    await asyncio.gather(a.task, c.task, d.task)
    assert (turns.running, turns.waiting) == (0, 0)


async def test_users_stop_the_newest_and_who_was_stopped_goes_first_again() -> None:
    turns = Turns(3, 1, quiet_s=0.01)
    log: list[str] = []
    a, b, c, d = [Holder(name, turns, log) for name in "abcd"]
    await settled()
    turns.users(1)
    turns.users(2)
    assert log[3:] == ["b stopped", "c stopped"] and turns.set_back == 2
    for one in (b, c):
        one.over.set()
    await settled()
    assert (turns.running, turns.waiting) == (1, 1)  # d waits: a is all that runs beside users
    back = Holder("b again", turns, log, again=True)
    await settled()
    turns.users(0)
    turns.users(1)
    await asyncio.sleep(0.03)
    assert turns.running == 1  # users were gone for too short a time
    turns.users(0)
    await asyncio.sleep(0.03)
    assert log[-2:] == ["b again in", "d in"]
    for one in (a, d, back):
        one.over.set()
    await asyncio.gather(a.task, d.task, back.task)


async def test_how_long_users_are_gone_counts_from_the_last_one() -> None:
    turns = Turns(3, 0, quiet_s=0.01)
    log: list[str] = []
    turns.users(1)
    one = Holder("a", turns, log)
    turns.users(0)
    first = turns._timer
    turns.users(1)
    turns.users(0)
    last = turns._timer
    assert first is not None and first.cancelled()
    assert last is not None and not last.cancelled()
    await one.inside.wait()
    assert log == ["a in"]
    one.over.set()
    await one.task


async def test_beside_users_one_follows_the_other() -> None:
    turns = Turns(3, 1)
    log: list[str] = []
    turns.users(1)
    a, b = Holder("a", turns, log), Holder("b", turns, log)
    await settled()
    assert log == ["a in"]
    a.over.set()
    b.over.set()
    await asyncio.gather(a.task, b.task)
    assert log == ["a in", "a out", "b in", "b out"]


async def test_with_none_beside_users_sampling_stands_still() -> None:
    turns = Turns(3, 0, quiet_s=0.0)
    log: list[str] = []
    turns.users(1)
    one = Holder("a", turns, log)
    await settled()
    assert log == []
    turns.users(0)
    await asyncio.sleep(0.01)
    assert log == ["a in"]
    one.over.set()
    await one.task


async def test_who_leaves_the_queue_leaves_no_hole() -> None:
    turns = Turns(1, 1)
    log: list[str] = []
    a, b, c = [Holder(name, turns, log) for name in "abc"]
    await settled()
    b.task.cancel()
    a.over.set()
    await settled()
    assert log == ["a in", "a out", "c in"] and (turns.running, turns.waiting) == (1, 0)
    d = Holder("d", turns, log)
    await settled()
    c.over.set()
    d.task.cancel()  # its turn may be granted in this very moment
    await asyncio.gather(c.task, d.task, return_exceptions=True)
    assert (turns.running, turns.waiting) == (0, 0)


async def test_a_turn_that_was_stopped_before_it_began_says_so() -> None:
    turns, called = Turns(2, 0), []
    async with turns.turn() as turn:
        turns.users(1)
        turn.on_stop(lambda: called.append("stop"))
        assert turn.stopped and called == ["stop"]
        turn.stop()
        assert called == ["stop"]
