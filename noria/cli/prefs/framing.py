"""The frame of an export: a header with its format and counts, and an end line with the hash of everything before.

Comes in: lines as JSON. Goes out: bytes, and the lines again once the file has proved whole. Must not import the store.

A file without a header is of format 1, which had no frame: each of its lines says `"format": 1`, and nothing tells
whether the last ones are missing. Whole files may stand one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from noria.errors import IntegrityError, InvalidRequest
from noria.records import Json

FORMAT = 2


def encoded(line: Json) -> bytes:
    """One line. ASCII only, so that whatever people and models wrote survives: NUL, lone surrogates."""
    return json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n"


def framed(counts: Mapping[str, int], lines: Iterable[Json]) -> Iterator[bytes]:
    """Header, lines, end."""
    header = encoded({"kind": "header", "format": FORMAT, "counts": dict(counts)})
    digest, number = hashlib.sha256(header), 0
    yield header
    for line in lines:
        data = encoded(line)
        digest.update(data)
        number += 1
        yield data
    yield encoded({"kind": "end", "lines": number, "sha256": digest.hexdigest()})


def require_whole(source: IO[bytes]) -> int:
    """Reads the whole file once and leaves it at its beginning; returns how many lines there are.

    Raises InvalidRequest for a line that is none and for a newer format, IntegrityError for a file that was cut off or
    changed, each naming the line.
    """
    digest, inside, since, number = hashlib.sha256(), False, 0, 0
    for number, data in enumerate(source, start=1):
        kind = kind_of(data)
        if kind == "header":
            if inside:
                raise IntegrityError(f"line {number}: a header, and the file before it has no end: it was cut off")
            _require_known(parsed(data, number), number)
            digest, inside, since = hashlib.sha256(data), True, 0
        elif kind == "end" and inside:
            _require_same(parsed(data, number), digest.hexdigest(), since, number)
            inside = False
        elif inside:
            digest.update(data)
            since += 1
    if inside:
        raise IntegrityError(f"the file has no end after line {number}: it was cut off; export it again")
    source.seek(0)
    return number


def parsed(data: bytes, number: int) -> Json:
    """A line's JSON. Raises InvalidRequest naming the line."""
    try:
        line = json.loads(data)
    except ValueError as error:
        raise InvalidRequest(f"line {number} is not a line of an export: {error}") from error
    if not isinstance(line, dict):
        raise InvalidRequest(f"line {number} is not a line of an export: it is no object")
    return line


def kind_of(data: bytes) -> str | None:
    """`header` or `end`, which stand first in their lines; None for the others, which are not parsed for it."""
    start = data[:32].replace(b" ", b"")
    for kind in ("header", "end"):
        if start.startswith(f'{{"kind":"{kind}"'.encode()):
            return kind
    return None


def _require_known(header: Json, number: int) -> None:
    found = header.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < FORMAT:
        raise InvalidRequest(f"line {number}: format {found!r} has no header; this is no export of Noria's")
    if found > FORMAT:
        raise InvalidRequest(
            f"line {number}: format {found} was written by a newer Noria than this one, which reads up to {FORMAT}: "
            "import it with that one, or upgrade this one",
            code="newer_format",
        )


def _require_same(end: Json, digest: str, lines: int, number: int) -> None:
    if end.get("lines") != lines:
        raise IntegrityError(f"line {number}: the end says {end.get('lines')} lines, there are {lines}: some are lost")
    if end.get("sha256") != digest:
        raise IntegrityError(f"line {number}: the lines have sha256 {digest}, the end says {end.get('sha256')}")
