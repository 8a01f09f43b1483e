"""Which rows of thumbs come in which micro-batch of KTO: drawn once from the seed, before the first step.

Comes in: each row's prompt, how many rows are wanted. Goes out: an `Order`. Must not import torch.

TRL takes the KL of a micro-batch from each prompt with the answer of the row before, the first with the last one's. An
answer to the same prompt would be no unrelated one, and a micro-batch of one row would have its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SEARCHED = 400  # rows that are looked at, from the nearest, for one to change places with


@dataclass(frozen=True)
class Order:
    """Rows of a whole training, one after the other. `alike` counts those whose KL is taken with another answer to
    their own prompt, because there was no row of another."""

    rows: tuple[int, ...]
    alike: int


def draw_order(prompts: Sequence[str], wanted: int, micro_batch: int, seed: int) -> Order:
    """Passes over the rows, each shuffled, until there are `wanted` (a multiple of `micro_batch`).

    Neighbours in a micro-batch, its last and first too, are of different `prompts` where changing places can do it.
    """
    chance = random.Random(f"{seed}:thumbs")  # noqa: S311 - an order, no secret
    rows: list[int] = []
    while len(rows) < wanted:
        one_pass = list(range(len(prompts)))
        chance.shuffle(one_pass)
        rows += one_pass
    order = _Places([prompts[row] for row in rows[:wanted]], rows[:wanted], micro_batch)
    for at in range(wanted):
        if order.is_alike(at):
            order.move(at)
    return Order(tuple(order.rows), sum(order.follows_its_like(at) for at in range(wanted)))


class _Places:
    """Rows and their prompts by place, in micro-batches that are rings."""

    def __init__(self, prompts: list[str], rows: list[int], micro_batch: int) -> None:
        self.rows = rows
        self._prompts = prompts
        self._micro_batch = micro_batch

    def follows_its_like(self, at: int) -> bool:
        """Whether the row before answers the same prompt."""
        start = at - at % self._micro_batch
        return self._prompts[at] == self._prompts[start + (at - start - 1) % self._micro_batch]

    def is_alike(self, at: int) -> bool:
        """The same, or the row behind does."""
        start = at - at % self._micro_batch
        return self.follows_its_like(at) or self.follows_its_like(start + (at - start + 1) % self._micro_batch)

    def move(self, at: int) -> None:
        """Changes places with the nearest row for which neither is then alike; none where there is no such row."""
        for other in self._nearest(at):
            self._swap(at, other)
            if not self.is_alike(at) and not self.is_alike(other):
                return
            self._swap(at, other)

    def _nearest(self, at: int) -> Iterable[int]:
        for away in range(1, SEARCHED // 2):
            if at + away < len(self.rows):
                yield at + away
            if at - away >= 0:
                yield at - away

    def _swap(self, one: int, other: int) -> None:
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self._prompts[one], self._prompts[other] = self._prompts[other], self._prompts[one]
