"""Preferences as a JSONL file that loses nothing, and back.

Comes in: a store and the pictures. Goes out: lines, each `{"kind": ...}`:
`image` (its bytes in base64), `completion` (the whole record), then every `preference` that stands on them. A
preference's line also carries the resolved prompt and both texts, for those who train elsewhere; import ignores these.
A line only refers to lines above it, so a file can be read, cut or joined as a stream.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from noria.errors import IntegrityError, InvalidRequest, NoriaError
from noria.records import Choice, Completion, Image, Json, Preference, Side

if TYPE_CHECKING:
    from noria.blobs import Blobs
    from noria.store import Store

FORMAT = 1


def export_lines(store: Store, blobs: Blobs) -> Iterator[tuple[Json, bool]]:
    """Every line, and whether it is a preference's. Raises NotFound when a picture's file is gone."""
    told_completions: set[str] = set()
    told_images: set[str] = set()
    for preference in store.iter_preferences():
        named = [side.completion_id for side in (preference.chosen, preference.rejected) if side.completion_id]
        found = {id_: store.get_completion(id_) for id_ in named}
        for completion in found.values():
            for image in completion.images:
                if image.sha256 not in told_images:
                    told_images.add(image.sha256)
                    yield _image_line(image, blobs), False
            if completion.id not in told_completions:
                told_completions.add(completion.id)
                yield {"kind": "completion", "format": FORMAT, **dataclasses.asdict(completion)}, False
        pair = {
            "messages": found[named[0]].messages,
            "chosen_text": text_of(preference.chosen, found),
            "rejected_text": text_of(preference.rejected, found),
        }
        yield {"kind": "preference", "format": FORMAT, **dataclasses.asdict(preference), "pair": pair}, True


def import_lines(store: Store, blobs: Blobs, lines: Iterable[str], tick: Callable[[int], None]) -> dict[str, int]:
    """Takes in what is not there yet; ids and times stay. Returns how many of each kind were new, and how many known.

    `tick` gets the number of lines read so far. Raises InvalidRequest or IntegrityError naming the line; what stood
    above it is in the store then, and the same file may be imported again.
    """
    counts = {"images": 0, "completions": 0, "preferences": 0, "known": 0}
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                kind, new = _take(store, blobs, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(f"line {number} is not a line of an export: {error!r}") from error
            except NoriaError as error:
                raise type(error)(f"line {number}: {error.message}", param=error.param, code=error.code) from error
            counts[kind if new else "known"] += 1
        tick(number)
    tick(number)
    return counts


def text_of(side: Side, completions: dict[str, Completion]) -> str | None:
    """A side's text; None when the completion has no such choice."""
    if side.completion_id is None:
        return side.text
    choices = completions[side.completion_id].choices
    return next((choice.text for choice in choices if choice.index == side.index), None)


def _image_line(image: Image, blobs: Blobs) -> Json:
    data = base64.b64encode(blobs.get(image.sha256)).decode()
    return {"kind": "image", "format": FORMAT, **dataclasses.asdict(image), "data": data}


def _take(store: Store, blobs: Blobs, line: Json) -> tuple[str, bool]:
    if line.get("format") != FORMAT:
        raise InvalidRequest(f"format {line.get('format')!r} is not {FORMAT}: made by another version of Noria?")
    kind = line["kind"]
    if kind == "image":
        data = base64.b64decode(line["data"], validate=True)
        digest = hashlib.sha256(data).hexdigest()
        if digest != line["sha256"]:
            raise IntegrityError(f"the picture's bytes have sha256 {digest}, the line says {line['sha256']}")
        known = blobs.exists(digest)
        blobs.put(data, line["media_type"])
        return "images", not known
    if kind == "completion":
        return "completions", store.add_completions([completion_of(line)]) == 1
    if kind == "preference":
        return "preferences", store.import_preference(preference_of(line))
    raise InvalidRequest(f"kind {kind!r} is none of image, completion, preference")


def completion_of(line: Json) -> Completion:
    """The record of a `completion` line. Raises KeyError or TypeError when the line is not one."""
    row = _fields(Completion, line)
    row["choices"] = tuple(
        Choice(**{**_fields(Choice, one), "token_ids": tuple(one["token_ids"]), "logprobs": tuple(one["logprobs"])})
        for one in row["choices"]
    )
    row["images"] = tuple(Image(**_fields(Image, one)) for one in row["images"])
    for name in ("messages", "prompt_token_ids"):
        row[name] = tuple(row[name])
    return Completion(**row)


def preference_of(line: Json) -> Preference:
    """The record of a `preference` line. Raises KeyError or TypeError when the line is not one."""
    row = _fields(Preference, line)
    for name in ("chosen", "rejected"):
        row[name] = Side(**_fields(Side, row[name]))
    return Preference(**row)


def _fields(record: type[Any], line: Json) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(record)}
    return {key: value for key, value in line.items() if key in names}
