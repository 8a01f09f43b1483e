"""Which samples come in which step: drawn once from the seed, the same for any number of processes.

Comes in: how many samples there are, the recipe's stage. Goes out: a `Plan`, a list of micro-batches.
A *unit* is what one row of a batch is made of: one sample, or the samples packed into one sequence.
Must not import torch: the order is the same on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from noria.errors import TrainingError
from noria.recipes import RecipeStage

Unit = tuple[int, ...]
Pack = Callable[[int], list[Unit]]
"""From the number of a pass to its units, in order."""
GROUPED_BATCHES = 16  # batches whose samples are sorted by length together: enough to be alike, few enough to mix


@dataclass(frozen=True)
class Plan:
    """`steps` optimiser steps of `per_step` micro-batches each; `micro_batches` are all of them, in order."""

    steps: int
    per_step: int
    micro_batches: tuple[tuple[Unit, ...], ...]

    def share(self, process: int, processes: int) -> list[tuple[Unit, ...]]:
        """One process's micro-batches: every `processes`-th one, so that a step's samples are the same for any number.

        Raises TrainingError when a step's micro-batches cannot be shared out evenly.
        """
        if self.per_step % processes:
            raise TrainingError(
                f"{self.per_step} micro-batches a step cannot be shared by {processes} processes: "
                "choose batch_size / micro_batch_size as a multiple of the processes",
                code="processes",
            )
        return list(self.micro_batches[process::processes])


def plan(
    stage: RecipeStage, samples: Sequence[int], lengths: Mapping[int, int] | None = None, pack: Pack | None = None
) -> Plan:
    """The whole stage's order over the `samples`, by number.

    `lengths` (tokens) group samples of like length; `pack` gives a pass whose samples share sequences.
    Raises TrainingError when there is nothing to train on.
    """
    if not samples:
        raise TrainingError(f"stage {stage.name!r} has no sample to train on", code="no_data")
    drawn = _units(stage, samples, pack)
    if stage.steps is not None:
        wanted, units = stage.steps * stage.batch_size, []
    else:
        units = _epochs(drawn, stage.epochs or 1.0)
        wanted = max(1, math.ceil(len(units) / stage.batch_size)) * stage.batch_size
    while len(units) < wanted:
        units += next(drawn)
    units = units[:wanted]
    rows = _grouped(stage, units, lengths) if lengths is not None else units
    micro = tuple(tuple(rows[at : at + stage.micro]) for at in range(0, wanted, stage.micro))
    return Plan(wanted // stage.batch_size, stage.batch_size // stage.micro, micro)


def _epochs(drawn: Iterator[list[Unit]], epochs: float) -> list[Unit]:
    units: list[Unit] = []
    for _ in range(int(epochs)):
        units += next(drawn)
    if rest := epochs - int(epochs):
        last = next(drawn)
        units += last[: max(1, round(rest * len(last)))]
    return units


def _units(stage: RecipeStage, samples: Sequence[int], pack: Pack | None) -> Iterator[list[Unit]]:
    """Passes over the data without end, each in an order of its own."""
    number = 0
    while True:
        chance = random.Random(f"{stage.seed}:{number}")  # noqa: S311 - an order, no secret
        if pack is not None:
            yield pack(number)
        else:
            rows = list(samples)
            chance.shuffle(rows)
            yield [(row,) for row in rows]
        number += 1


def _grouped(stage: RecipeStage, units: list[Unit], lengths: Mapping[int, int]) -> list[Unit]:
    """Micro-batches of like length, in a random order; a window of several batches is sorted at a time."""
    chance = random.Random(f"{stage.seed}:lengths")  # noqa: S311 - an order, no secret
    window = GROUPED_BATCHES * stage.batch_size
    ordered: list[Unit] = []
    for start in range(0, len(units), window):
        alike = sorted(units[start : start + window], key=lambda unit: sum(lengths[one] for one in unit))
        micro = [alike[at : at + stage.micro] for at in range(0, len(alike), stage.micro)]
        chance.shuffle(micro)
        ordered += [unit for one in micro for unit in one]
    return ordered
