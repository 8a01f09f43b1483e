"""Rows of a JSONL or a parquet file, numbered, and the checks that every reader makes on them.

Comes in: a path. Goes out: rows as dicts with their numbers; bad lines apart. Parquet needs pyarrow, which comes with
`noria[model]`; its pictures stay in the file until they are asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from noria.errors import InvalidRequest
from noria.evals.questions import Picture, Question
from noria.evals.readers.pictures import picture_at
from noria.records import BadRow

Row = dict[str, Any]
Read = tuple[list[Question], list[BadRow]]


class RowError(ValueError):
    """A row that cannot be asked; the message says why."""


def read_rows(path: Path, make: Callable[[Row, Path, int], Question]) -> Read:
    """Every row of the file through `make`; a RowError from it, or a line that is no JSON object, is a bad row."""
    questions: list[Question] = []
    bad: list[BadRow] = []
    for line, row in rows_of(path):
        try:
            if isinstance(row, str):
                raise RowError(row)
            questions.append(make(row, path, line))
        except RowError as error:
            bad.append(BadRow(str(path), line, str(error)))
    return questions, bad


def rows_of(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Numbered rows, from 1; in place of a line that is no JSON object stands the reason, as text."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_row(line)


def _json_row(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a {type(row).__name__}, not a JSON object"


def columns_of(path: Path) -> set[str]:
    """The names in the first row of a JSONL file, or the columns of a parquet file."""
    if path.suffix == ".parquet":
        return set(_parquet(path).schema_arrow.names)
    return next((set(row) for _, row in rows_of(path) if isinstance(row, dict)), set())


def _parquet(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InvalidRequest(f"{path} needs pyarrow: pip install 'noria[model]'", param="set") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both of these
        raise InvalidRequest(f"{path} is not a parquet file: {error}", param="set") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows whose picture columns hold a `Picture`, which reads its cell when asked."""
    opened = _parquet(path)
    pictures = [name for name in opened.schema_arrow.names if name == "image" or name.startswith("image_")]
    structs = {name for name in pictures if "bytes" in str(opened.schema_arrow.field(name).type)}
    plain = [name for name in opened.schema_arrow.names if name not in structs]
    for group in range(opened.num_row_groups):
        there = {name: _present(opened, group, name) for name in structs}
        for at, row in enumerate(opened.read_row_group(group, columns=plain).to_pylist()):
            cells = {n: _cell(path, group, n, at) if there[n][at] else None for n in structs}
            yield {**row, **cells}


def _present(opened: Any, group: int, name: str) -> list[bool]:
    column = opened.read_row_group(group, columns=[name]).column(name)
    return [bool(one) for one in column.is_valid().to_pylist()]


def _cell(path: Path, group: int, name: str, at: int) -> Picture:
    def read() -> bytes:
        cell = _picture_column(path, group, name)[at].as_py()
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            return picture_at(str(cell["path"]), path.parent).read()
        if data is None:
            raise ValueError(f"picture: column {name} holds neither bytes nor a path")
        return bytes(data)

    return Picture(f"{path.name}:{name}", read)


@lru_cache(maxsize=4)
def _picture_column(path: Path, group: int, name: str) -> Any:
    """One row group of one column: what is asked in order is read from the disk once."""
    return _parquet(path).read_row_group(group, columns=[name]).column(name)


def text_of(row: Row, *keys: str) -> str:
    """The first of the keys that is there, as text. Raises RowError when none is, or it is empty."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise RowError(f"no {' or '.join(map(repr, keys))}")


def texts_of(value: Any, key: str) -> tuple[str, ...]:
    """A list of texts or numbers, or a single one. Raises RowError for anything else, and for an empty list."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in listed):
        raise RowError(f"{key!r} must be a text or a list of texts")
    return tuple(str(one).strip() for one in listed)
