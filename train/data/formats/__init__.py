"""The formats of training rows, and which of them a row is in.

Comes in: one row as a dict. Goes out: samples of the kind that a stage trains on. A row's keys say its format; a
`DataSource.format` other than `auto` settles it. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from noria.errors import InvalidRequest
from noria.methods.table import LABELLED_KINDS, PREFERENCE_KINDS
from noria.records import Json
from train.data.formats import ms_swift, openai, plain, sharegpt, trl
from train.data.formats.export import KINDS as EXPORT_KINDS
from train.data.formats.export import ExportReader
from train.data.formats.pictures import Place
from train.data.formats.turns import TAG, Conversation
from train.data.samples import AnySample

__all__ = ["FORMATS", "RowReader", "detect"]

_PARSERS: dict[str, Callable[[Json, Place], list[Conversation]]] = {
    "openai": openai.parse,
    "ms-swift": ms_swift.parse,
    "llama-factory": sharegpt.parse_llama_factory,
    "trl": trl.parse,
    "llava": sharegpt.parse_llava,
    "image-text": plain.parse,
}
FORMATS = ("noria", *_PARSERS, "labels")


def detect(row: Json) -> str:
    """The row's format by its keys. Raises InvalidRequest listing them when they fit none."""
    has = {key for key, value in row.items() if value is not None}
    if row.get("kind") in EXPORT_KINDS and "format" in has:
        return "noria"
    if "image" in has and has & {"labels", "objects"}:
        return "labels"
    if "conversations" in has:
        return "llama-factory" if has & {"images", "chosen", "rejected"} else "llava"
    if "messages" in has:
        return _of_messages(row, has)
    if "instruction" in has:
        return "llama-factory"
    if has >= {"query", "response"}:
        return "ms-swift"
    if has >= {"input", "preferred_output"}:
        return "openai"
    if has >= {"prompt", "completion"} or has >= {"chosen", "rejected"}:
        return "trl"
    if "image" in has and has & {"text", "question"}:
        return "image-text"
    raise InvalidRequest(f"the row fits no known format; its keys: {', '.join(sorted(map(str, has))) or 'none'}")


class RowReader:
    """Turns the rows of one file into samples of one kind, in the order in which the file has them."""

    def __init__(self, kind: str, asked: str = "auto") -> None:
        """`kind` is that of a recipe's stage; `asked` is a DataSource's format. Raises InvalidRequest if unknown."""
        if asked != "auto" and asked not in FORMATS:
            raise InvalidRequest(f"format {asked!r} is none of auto, {', '.join(FORMATS)}", param="format")
        self._kind = kind
        self._asked = asked
        self._export = ExportReader()
        self.seen: dict[str, int] = {}

    def samples(self, row: Any, place: Place, source: str) -> list[AnySample]:
        """The row's samples: none when it says nothing for this kind. Raises InvalidRequest with the reason."""
        if not isinstance(row, dict):
            raise InvalidRequest(f"the row is {type(row).__name__}, not an object")
        name = detect(row) if self._asked == "auto" else self._asked
        self.seen[name] = self.seen.get(name, 0) + 1
        if (name == "labels") != (self._kind in LABELLED_KINDS):
            raise InvalidRequest(f"a row of format {name!r} cannot be used by a {self._kind!r} stage")
        if name == "labels":
            return [plain.parse_labels(row, place, source)]
        parse = self._export.parse if name == "noria" else _PARSERS[name]
        found = parse(row, place)
        if self._kind == "kto":
            return [thumb for one in found for thumb in one.thumbs(source, row)]
        if self._kind in PREFERENCE_KINDS:
            return [one.preference(source) for one in found]
        return [one.sample(source) for one in found[:1]]


def _of_messages(row: Json, has: set[str]) -> str:
    if "rejected_response" in has or "rejected_messages" in has:
        return "ms-swift"
    if has & {"chosen", "rejected"}:
        return "llama-factory"
    contents = [turn.get("content") for turn in row["messages"] if isinstance(turn, dict)]
    if has & {"images", "image"}:
        return "ms-swift" if all(isinstance(content, str | None) for content in contents) else "trl"
    if any(isinstance(content, str) and TAG in content for content in contents):
        return "ms-swift"  # it will say that the tag has no picture
    return "openai"
