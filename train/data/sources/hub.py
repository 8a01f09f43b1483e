"""Rows of a Hugging Face data set, by its name (`owner/name` or `owner/name:configuration`) and split.

Comes in: the name. Goes out: a lazy sequence of `RawRow`s; pictures stay the bytes that the data set holds.
Code of a data set is never run (`datasets` has dropped it). Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, overload

from noria.errors import NotFound, Unavailable
from train.data.sources.files import SUFFIXES, RawRow

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def is_name(source: str) -> bool:
    """Whether the source may be a data set's name: not a path, and not what a file of rows is called."""
    return bool(_NAME.fullmatch(source)) and not source.lower().endswith(SUFFIXES)


class HubRows(Sequence[RawRow]):
    """The rows of one split, read as they are asked for; `line` counts from 1."""

    def __init__(self, name: str, split: str) -> None:
        """Downloads it, or finds it in the cache. Raises NotFound (no such data set or split) or Unavailable."""
        import datasets

        path, _, configuration = name.partition(":")
        try:
            # The name is the operator's, who may pin it by a copy; datasets 4 runs no code of a data set.
            found = datasets.load_dataset(path, configuration or None, split=split)  # nosec B615
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            raise NotFound(f"no file and no data set {name!r}: {error}", param="source") from error
        except ValueError as error:  # an unknown split or configuration; the message lists those there are
            raise NotFound(f"data set {name!r}, split {split!r}: {error}", param="split") from error
        except OSError as error:
            raise Unavailable(f"data set {name!r} cannot be fetched: {error}", param="source") from error
        self._rows: Any = found.with_format("arrow")  # plain values: pictures are not decoded, nothing is copied
        self._name = f"{name}[{split}]"

    def __len__(self) -> int:
        """How many rows the split has."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> RawRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[RawRow]: ...
    def __getitem__(self, index: int | slice) -> RawRow | list[RawRow]:
        """A row, or several."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return RawRow(self._name, number + 1, self._rows[number : number + 1].to_pylist()[0], None)
