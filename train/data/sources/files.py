"""Rows of files: on this machine, or anywhere that fsspec reaches (`http(s)://`, `s3://`, `gs://`, `memory://`, ...).

Comes in: a path or URL of a file, a folder or a pattern. Goes out: `RawRow`s, one a line (an array's item, a table's
row), those that cannot be read included, with the reason. JSON lines, a JSON array, CSV, TSV and Parquet are known;
`.gz`, `.bz2` and `.xz` are unpacked on the way. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import PurePosixPath
from typing import IO, Any

from noria.errors import InvalidRequest, NoriaError, NotFound, Unavailable

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class RawRow:
    """One row as it was written. `problem` says why `value` could not be read; `folder` is where its pictures start."""

    file: str
    line: int
    value: Any
    folder: str | None
    problem: str | None = None


def is_url(source: str) -> bool:
    """Whether the source names its file system."""
    return bool(_URL.match(source))


def exists(source: str) -> bool:
    """Whether a path of this machine (or a pattern) leads to something; URLs are not asked."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(source)
    return bool(fs.glob(path) if "*" in source else fs.exists(path))


def read_rows(source: str) -> list[RawRow]:
    """All rows of a file, or of the files of a folder or pattern in the order of their names.

    Raises NotFound when nothing is there, Unavailable when the place does not answer, InvalidRequest when the machine
    has no package for such a place or file.
    """
    with _place_of(source):
        files = _files(source)
        if not files:
            raise NotFound(f"no data at {source!r} (known are {', '.join(SUFFIXES)})", param="source")
        return [row for file in files for row in _rows(file)]


def _files(source: str) -> list[str]:
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(source)
    if source.startswith(("http://", "https://")):
        return [source]  # a server lists no folders
    if "*" in source:
        found = sorted(fs.glob(path))
    elif fs.isdir(path):
        found = sorted(one for one in fs.find(path, maxdepth=1) if _suffix(one) in SUFFIXES)
    else:
        return [source]
    return [fs.unstrip_protocol(one) if is_url(source) else str(one) for one in found]


def _rows(file: str) -> Iterator[RawRow]:
    import fsspec

    suffix, folder = _suffix(file), _folder(file)
    with fsspec.open(file, "rb", compression="infer") as stream:
        if suffix == ".parquet":
            yield from _parquet(stream, file, folder)
        elif suffix in (".csv", ".tsv"):
            text = TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",")
            for row in table:
                yield RawRow(file, table.line_num, {key: value or None for key, value in row.items()}, folder)
        else:
            yield from _json(stream, file, folder)


def _json(stream: IO[bytes], file: str, folder: str | None) -> Iterator[RawRow]:
    """Lines, or the items of an array: then `line` is the item's number."""
    for number, line in enumerate(stream, start=1):
        if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _array(line + stream.read(), file, folder)
            return
        if line.strip():
            yield _parsed(line, file, number, folder)


def _array(data: bytes, file: str, folder: str | None) -> Iterator[RawRow]:
    try:
        items = json.loads(data)
    except ValueError as error:
        yield RawRow(file, getattr(error, "lineno", 1), None, folder, f"not JSON: {error}")
        return
    for number, item in enumerate(items, start=1):
        yield RawRow(file, number, item, folder)


def _parsed(line: bytes, file: str, number: int, folder: str | None) -> RawRow:
    try:
        return RawRow(file, number, json.loads(line), folder)
    except (ValueError, RecursionError) as error:
        return RawRow(file, number, None, folder, f"not JSON: {error}")


def _parquet(stream: IO[bytes], file: str, folder: str | None) -> Iterator[RawRow]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield RawRow(file, number, row, folder)


def _suffix(file: str) -> str:
    path = PurePosixPath(file.partition("?")[0] if is_url(file) else file)
    return (path.with_suffix("") if path.suffix.lower() in _PACKED else path).suffix.lower()


def _folder(file: str) -> str | None:
    if file.lower().startswith("file://"):
        file = re.sub(r"^file://", "", file, flags=re.IGNORECASE)
    if is_url(file):
        return file.partition("?")[0].rpartition("/")[0]
    return str(PurePosixPath(file).parent)


@contextmanager
def _place_of(source: str) -> Iterator[None]:
    """Errors of file systems in Noria's words."""
    try:
        yield
    except NoriaError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # fsspec calls a server that does not answer a missing file
            raise Unavailable(f"{source!r} does not answer: {error.__cause__}", param="source") from error
        raise NotFound(f"no data at {source!r}: {error}", param="source") from error
    except ImportError as error:
        raise InvalidRequest(f"{source!r} needs a package that is not installed: {error}", param="source") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{source!r} is not UTF-8 text: {error}", param="source") from error
    except ValueError as error:
        raise InvalidRequest(f"{source!r} cannot be read: {error}", param="source") from error
    except Exception as error:  # fsspec's back ends let their libraries' own errors through
        raise Unavailable(f"{source!r} cannot be read: {error!r}", param="source") from error
