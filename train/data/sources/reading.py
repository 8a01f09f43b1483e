"""One source read into samples: found, parsed row by row, chosen from, counted and hashed.

Comes in: a recipe's `DataSource`. Goes out: `SourceData` with its report. A row that cannot be used is reported with
file, line and reason and does not stop the rest, unless the source is strict.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from noria.errors import InvalidRequest, TrainingError
from noria.records import BadRow
from train.data.formats import RowReader
from train.data.formats.export import KINDS as EXPORT_KINDS
from train.data.formats.pictures import KeepImage, Place, as_data_url
from train.data.samples import AnySample, ReadReport
from train.data.sources import files, hub, made
from train.data.sources.files import RawRow

if TYPE_CHECKING:
    from noria.recipes import DataSource

REPORTED = 100  # bad rows told one by one; all of them are counted


class SourceData(Sequence[AnySample]):
    """A source's samples, in the order of its rows, and what became of every row."""

    def __init__(self, samples: Sequence[AnySample], report: ReadReport) -> None:
        self._samples = samples
        self.report = report

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> AnySample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AnySample]: ...
    def __getitem__(self, index: int | slice) -> AnySample | Sequence[AnySample]:
        """A sample, or several."""
        return self._samples[index]


def read(source: DataSource, kind: str, *, keep_image: KeepImage = as_data_url) -> SourceData:
    """Reads a source for a stage of this kind (vision, align, sft, finetune, dpo and its kin, kto).

    `keep_image` stores pictures that are embedded in rows; without it their references carry their bytes. With
    `source.count` a random choice by `source.seed` is read. Raises NotFound, Unavailable, InvalidRequest; TrainingError
    when no row can be used, or one cannot and the source is strict.
    """
    raw = _raw_rows(source, kind)
    reading = _Reading(source, kind, keep_image)
    in_order = len(raw) > 0 and isinstance(raw[0].value, dict) and raw[0].value.get("kind") in EXPORT_KINDS
    if source.count is None or in_order or made.is_made(source.source):
        for number in range(len(raw)):
            reading.take(number, raw[number])
    else:
        for number in random.Random(source.seed).sample(range(len(raw)), len(raw)):  # noqa: S311 - a choice, no secret
            if len(reading.kept) >= source.count:
                break
            reading.take(number, raw[number])
    return reading.data(len(raw))


def _raw_rows(source: DataSource, kind: str) -> Sequence[RawRow]:
    if made.is_made(source.source):
        return made.rows(source.source, kind, source.split, source.count, source.seed)
    if files.is_url(source.source) or files.exists(source.source) or not hub.is_name(source.source):
        return files.read_rows(source.source)
    return hub.HubRows(source.source, source.split)


class _Reading:
    """What has been taken of one source so far."""

    def __init__(self, source: DataSource, kind: str, keep_image: KeepImage) -> None:
        self._source = source
        self._reader = RowReader(kind, source.format)
        self._keep_image = keep_image
        self._places: dict[str, Place] = {}
        self.kept: dict[int, tuple[list[AnySample], bytes]] = {}
        self._bad: list[tuple[int, BadRow]] = []
        self._left_out = 0

    def take(self, number: int, row: RawRow) -> None:
        """One row: kept, left out, or bad. Raises TrainingError on a bad one where the source is strict."""
        place = self._places.setdefault(row.file, Place(row.file, row.folder, self._keep_image))
        try:
            if row.problem is not None:
                raise InvalidRequest(row.problem)
            samples = self._reader.samples(row.value, place, f"{row.file}:{row.line}")
        except InvalidRequest as error:
            if error.param == "format" or self._source.strict:
                raise TrainingError(f"{row.file}:{row.line}: {error.message}", code="bad_row") from error
            self._bad.append((number, BadRow(row.file, row.line, error.message)))
            return
        if samples:
            self.kept[number] = (samples, _digest(row.value))
        else:
            self._left_out += 1

    def data(self, rows: int) -> SourceData:
        """The samples and the report. Raises TrainingError when there are none."""
        chosen = sorted(self.kept)
        if self._source.count is not None and len(chosen) > self._source.count:
            chosen = sorted(random.Random(self._source.seed).sample(chosen, self._source.count))  # noqa: S311
        bad = [one for _, one in sorted(self._bad, key=lambda numbered: numbered[0])]
        if not chosen:
            why = f"; {bad[0].file}:{bad[0].line}: {bad[0].reason}" if bad else ""
            raise TrainingError(f"{self._source.source}: none of {rows} rows can be used{why}", code="no_data")
        digest = hashlib.sha256(b"".join(self.kept[number][1] for number in chosen)).hexdigest()
        samples = [sample for number in chosen for sample in self.kept[number][0]]
        counts = {"rows": rows, "kept": len(chosen), "bad": len(bad), "left_out": self._left_out}
        counts["not_asked"] = rows - len(chosen) - len(bad) - self._left_out
        counts["samples"] = len(samples)
        seen = sorted(self._reader.seen)
        name = " and ".join(seen) if seen else self._source.format
        report = ReadReport(self._source.source, name, counts, tuple(bad[:REPORTED]), f"sha256:{digest}")
        return SourceData(samples, report)


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
