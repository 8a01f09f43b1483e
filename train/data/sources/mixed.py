"""Several sources as one set of samples, each as often as its weight says.

Comes in: a stage's sources. Goes out: `MixedData`. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from train.data.formats.pictures import KeepImage, as_data_url
from train.data.samples import AnySample
from train.data.sources.reading import SourceData, read

if TYPE_CHECKING:
    from noria.recipes import DataSource


class MixedData(Sequence[AnySample]):
    """The samples of all sources, one source after the other: training shuffles them.

    A weight of 2 has every sample twice an epoch, 0.5 half of them (a choice by `seed`). `sha256` is over the sources'
    own hashes and their shares.
    """

    def __init__(self, parts: Sequence[tuple[SourceData, float]], seed: int = 0) -> None:
        self.reports = tuple(data.report for data, _ in parts)
        self._parts = [data for data, _ in parts]
        self._rows = [
            (number, row)
            for number, (data, weight) in enumerate(parts)
            for row in _shares(len(data), weight, random.Random(f"{seed}:{number}"))  # noqa: S311 - no secret
        ]
        told = "\n".join(f"{data.report.sha256} {weight:g} {seed}" for data, weight in parts)
        self.sha256 = f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"

    def __len__(self) -> int:
        """How many samples an epoch has."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> AnySample: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnySample]: ...
    def __getitem__(self, index: int | slice) -> AnySample | list[AnySample]:
        """A sample, or several."""
        if isinstance(index, slice):
            return [self._parts[part][row] for part, row in self._rows[index]]
        part, row = self._rows[index]
        return self._parts[part][row]


def read_all(
    sources: Sequence[DataSource], kind: str, *, keep_image: KeepImage = as_data_url, seed: int = 0
) -> MixedData:
    """Reads a stage's sources. Raises as `read`."""
    return MixedData([(read(one, kind, keep_image=keep_image), one.weight) for one in sources], seed)


def _shares(count: int, weight: float, choice: random.Random) -> list[int]:
    whole = int(weight)
    rest = round(count * (weight - whole))
    return [*(row for row in range(count) for _ in range(whole)), *sorted(choice.sample(range(count), rest))]
