"""The day's tokens: added up, written lazily, never lost to a store that is away for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from noria.errors import Unavailable
from serve.access.limits.tokens import DAY_S, TokenBook


class Sheet:
    """A small store of tokens that can be away."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], int] = {}
        self.away = False
        self.writes = 0

    def add_tokens(self, used: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
        """As the store's."""
        if self.away:
            raise Unavailable("away")
        self.writes += 1
        for dated, tokens in used.items():
            self.rows[dated] = self.rows.get(dated, 0) + tokens
        return {dated: self.rows[dated] for dated in used}

    def tokens_of(self, day: int) -> dict[str, int]:
        """As the store's."""
        return {key: tokens for (key, on), tokens in self.rows.items() if on == day}


class Wall:
    """A clock in days."""

    def __init__(self) -> None:
        self.days = 100.5

    def __call__(self) -> float:
        return self.days * DAY_S


async def test_a_day_begins_at_midnight_utc() -> None:
    """The old day's tokens are written to the old day."""
    sheet, wall = Sheet(), Wall()
    book = TokenBook(sheet, wall)
    book.add("a", 5)
    assert book.used("a") == 5 and book.left_s() == DAY_S / 2
    wall.days = 101.0
    assert book.used("a") == 0 and book.left_s() == DAY_S
    book.add("a", 2)
    await book.write()
    assert sheet.rows == {("a", 100): 5, ("a", 101): 2} and book.used("a") == 2


async def test_a_clock_that_is_set_back_gives_nothing_back() -> None:
    """The day goes on."""
    wall = Wall()
    book = TokenBook(None, wall)
    book.add("a", 5)
    wall.days = 99.0
    assert book.used("a") == 5


async def test_several_servers_learn_of_each_other() -> None:
    """Each adds its own, and reads the sum when it writes."""
    sheet, wall = Sheet(), Wall()
    one, other = TokenBook(sheet, wall), TokenBook(sheet, wall)
    one.add("a", 5)
    await one.write()
    other.add("a", 7)
    await other.write()
    assert other.used("a") == 12
    third = TokenBook(sheet, wall)
    await third.load()
    assert third.used("a") == 12


async def test_nothing_is_lost_while_the_store_is_away() -> None:
    """It is written once, when the store is back."""
    sheet = Sheet()
    book = TokenBook(sheet, Wall())
    book.add("a", 5)
    sheet.away = True
    await book.write()
    book.add("a", 1)
    assert book.failed_writes == 1 and book.used("a") == 6
    sheet.away = False
    await book.write()
    await book.write()
    assert sheet.rows == {("a", 100): 6} and sheet.writes == 1


async def test_it_is_written_beside_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being asked."""
    monkeypatch.setattr("serve.access.limits.tokens.WRITE_S", 0.01)
    sheet = Sheet()
    book = TokenBook(sheet, Wall())
    keeping = asyncio.create_task(book.keep())
    book.add("a", 5)
    async with asyncio.timeout(10):
        while not sheet.rows:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert sheet.rows == {("a", 100): 5}
