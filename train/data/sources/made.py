"""Rows of what Noria draws or carries itself: `noria.scenes` by the name of one of its sets.

Comes in: a set's name. Goes out: `RawRow`s, as if they had been read from a file.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from noria.scenes import SETS
from noria.scenes import rows as made_rows
from train.data.sources.files import RawRow


def is_made(source: str) -> bool:
    """Whether the source is one of Noria's own sets; a file of such a name is reached as `./scenes`."""
    return source in SETS


def rows(name: str, kind: str, split: str, count: int | None, seed: int) -> list[RawRow]:
    """The set's rows for a stage of this kind: `count` of them, or as many as the set has."""
    made = made_rows(name, kind, split=split, count=count, seed=seed)
    return [RawRow(f"{name}[{split}]", number, row, None) for number, row in enumerate(made, start=1)]
