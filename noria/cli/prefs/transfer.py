"""Preferences and feedback as a JSONL file that loses nothing, and back.

Comes in: a store and the pictures. Goes out: lines, each `{"kind": ...}`: a header, `image` (its bytes in base64),
`completion` (the whole record), every `preference` that stands on them, every `feedback`, and an end with the hash of
it all (`noria.cli.prefs.framing`). A preference's line also carries the resolved prompt and both texts, for those who
train elsewhere; import ignores these. A line only refers to lines above it. Snapshots stay: they belong to jobs and
versions of their own home.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from sqlalchemy.exc import StatementError

from noria.cli.prefs.framing import FORMAT, framed, kind_of, parsed, require_whole
from noria.errors import IntegrityError, InvalidRequest, NoriaError, NotFound
from noria.records import Choice, Completion, Feedback, Image, Json, Preference, Side

if TYPE_CHECKING:
    from noria.blobs import Blobs
    from noria.store import Store


def counted(store: Store) -> dict[str, int]:
    """How much an export would hold of each kind."""
    completions: set[str] = set()
    counts = {"preferences": 0, "feedback": 0}
    for preference in store.iter_preferences():
        counts["preferences"] += 1
        completions.update(_named(preference))
    for feedback in store.iter_feedback():
        counts["feedback"] += 1
        completions.add(feedback.completion_id)
    images = {image.sha256 for id_ in completions for image in store.get_completion(id_).images}
    return {"images": len(images), "completions": len(completions), **counts}


def export(store: Store, blobs: Blobs, counts: dict[str, int], tick: Callable[[int], None]) -> Iterator[bytes]:
    """The file, line by line; `counts` as `counted` told them, `tick` gets the number of judgements so far.

    Raises NotFound when something was deleted meanwhile: the file is then not whole.
    """
    try:
        yield from framed(counts, export_lines(store, blobs, tick))
    except NotFound as error:
        raise NotFound(f"{error.message}; was it deleted while exporting? Export again", param=error.param) from error


def export_lines(store: Store, blobs: Blobs, tick: Callable[[int], None] = lambda done: None) -> Iterator[Json]:
    """Every line between the header and the end. Raises NotFound when a picture's file is gone."""
    told: set[str] = set()
    done = 0
    for preference in store.iter_preferences():
        named = _named(preference)
        found = {id_: store.get_completion(id_) for id_ in named}
        for completion in found.values():
            yield from _completion_lines(completion, blobs, told)
        pair = {
            "messages": found[named[0]].messages,
            "chosen_text": text_of(preference.chosen, found),
            "rejected_text": text_of(preference.rejected, found),
        }
        yield {"kind": "preference", **dataclasses.asdict(preference), "pair": pair}
        done += 1
        tick(done)
    for feedback in store.iter_feedback():
        if feedback.completion_id not in told:
            yield from _completion_lines(store.get_completion(feedback.completion_id), blobs, told)
        yield {"kind": "feedback", **dataclasses.asdict(feedback)}
        done += 1
        tick(done)


def import_file(store: Store, blobs: Blobs, source: IO[bytes], tick: Callable[[int], None]) -> dict[str, int]:
    """Takes in what is not there yet; ids and times stay. Returns how many of each kind were new, and how many known.

    `source` must be seekable: a file with a header is read to its end before anything is taken, and nothing is where it
    is not whole. `tick` gets the number of lines read so far. Raises InvalidRequest or IntegrityError naming the line;
    what stood above it is in the store then, and the same file may be imported again: that goes on where it stopped.
    """
    require_whole(source)
    counts = {"images": 0, "completions": 0, "preferences": 0, "feedback": 0, "known": 0}
    number = 0
    inside = False
    for number, data in enumerate(source, start=1):
        frame = kind_of(data)
        if frame is not None:
            inside = frame == "header"
        elif data.strip():
            line = parsed(data, number)
            try:
                found, new = _take(store, blobs, line, None if inside else 1)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidRequest(f"line {number} is not a line of an export: {error!r}") from error
            except StatementError as error:  # its own text would show the whole row
                raise InvalidRequest(f"line {number} is not a line of an export: {error.orig}") from error
            except NoriaError as error:
                raise type(error)(f"line {number}: {error.message}", param=error.param, code=error.code) from error
            counts[found if new else "known"] += 1
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
    return {"kind": "image", **dataclasses.asdict(image), "data": data}


def _completion_lines(completion: Completion, blobs: Blobs, told: set[str]) -> Iterator[Json]:
    """Its pictures and itself, as far as they were not told yet."""
    for image in completion.images:
        if image.sha256 not in told:
            told.add(image.sha256)
            yield _image_line(image, blobs)
    if completion.id not in told:
        told.add(completion.id)
        yield {"kind": "completion", **dataclasses.asdict(completion)}


def _named(preference: Preference) -> list[str]:
    return [side.completion_id for side in (preference.chosen, preference.rejected) if side.completion_id]


def _take(store: Store, blobs: Blobs, line: Json, needs: int | None) -> tuple[str, bool]:
    """Takes one line in; `needs` is the format that it must name itself, where no header did."""
    if line.get("format") != needs:
        known = f"a line without a header names format {needs}" if needs else f"the header said format {FORMAT}"
        raise InvalidRequest(f"format {line.get('format')!r}: {known}; made by another version of Noria?")
    kind = line["kind"]
    if kind == "image":
        data = base64.b64decode(line["data"], validate=True)
        digest = hashlib.sha256(data).hexdigest()
        if digest != line["sha256"]:
            raise IntegrityError(f"the picture's bytes have sha256 {digest}, the line says {line['sha256']}")
        there = blobs.exists(digest)
        blobs.put(data, line["media_type"])
        return "images", not there
    if kind == "completion":
        return "completions", store.add_completions([completion_of(line)], blobs.exists) == 1
    if kind == "preference":
        return "preferences", store.import_preference(preference_of(line))
    if kind == "feedback":
        return "feedback", store.import_feedback(Feedback(**_fields(Feedback, line)))
    raise InvalidRequest(f"kind {kind!r} is none of image, completion, preference, feedback")


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
