"""Which samples share a row.

Comes in: the samples' lengths in tokens, a row's budget. Goes out: packs, as the samples' numbers.
Must not import torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from noria.errors import SettingsError

_WINDOW = 1024  # samples that are fitted together; larger fills better and mixes less


def plan(lengths: Sequence[int], budget: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Which samples share a row of at most `budget` tokens: every sample once, in a seeded random mixture.

    First-fit decreasing over windows of the shuffled samples. Raises SettingsError when a sample is longer than a row.
    """
    if lengths and max(lengths) > budget:
        longest = max(lengths)
        raise SettingsError(f"a pack holds {budget} tokens and a sample has {longest}: raise it", param="max_length")
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, no secret
    packs: list[tuple[int, ...]] = []
    for start in range(0, len(order), _WINDOW):
        packs += _fit(order[start : start + _WINDOW], lengths, budget)
    random.Random(seed + 1).shuffle(packs)  # noqa: S311
    return packs


def _fit(numbers: Sequence[int], lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(numbers, key=lambda one: -lengths[one]):
        place = next((index for index, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(number)
        room[place] -= lengths[number]
    return [tuple(pack) for pack in packs]
