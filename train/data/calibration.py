"""Which conversations GPTQ is calibrated on, and which ones the artefact is verified on.

Comes in: the snapshot's pairs, or thumbs, and recent completions. Goes out: references that a restart finds again, and
the samples themselves. References and not texts are kept: what a user has deleted since is left out. So is what shows
anything but text and stored pictures.
Must not import torch.

The recipe: chosen answers of training pairs first, evenly spread over them, since that is what the new policy is to
say; recent finished answers to prompts of the training side fill up. Verification takes held-out pairs; where there
are too few, recent conversations that calibration did not take; where none are left, calibration's own, and says so. Of
thumbs, the answers with a thumb up stand for the chosen ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from noria.errors import NotFound
from noria.records import Completion, Json, Pair, Thumb, image_references
from train.data.render import is_readable
from train.data.samples import LoadImage
from train.export.rendering import CalibrationSample

Row = Pair | Thumb
RECIPE = "chosen answers of training pairs, evenly spread, then recent completions of prompts that are not held out"


def choose(
    train: Sequence[Row],
    held_out: Sequence[Row],
    recent: Sequence[Completion],
    counts: tuple[int, int],
    aside: Callable[[str], bool],
) -> Json:
    """References for calibration and verification; `counts` is how many of each are wanted.

    `aside` says of a prompt's hash that it is held out: calibration never sees such a prompt.
    """
    wanted, checked = counts
    train, held_out = _good(train), _good(held_out)
    half = wanted if not recent else max(1, (wanted + 1) // 2)
    calibration = [_of_row(row) for row in _spread(train, half)]
    answered, unreadable = usable(recent)
    others = [of_completion(one) for one in answered]
    calibration += [of_completion(one) for one in answered if not aside(one.prompt_hash)][: wanted - len(calibration)]
    calibration += [_of_row(row) for row in train if _of_row(row) not in calibration][: wanted - len(calibration)]
    fresh = [reference for reference in others if reference not in calibration]
    verification = [_of_row(row) for row in _spread(held_out, checked)]
    verification += fresh[: checked - len(verification)]
    return {
        "recipe": RECIPE,
        "calibration": calibration,
        "verification": verification or calibration[:checked],
        "verified_on_calibration": not verification,
        "unreadable": unreadable,
    }


def usable(recent: Sequence[Completion]) -> tuple[list[Completion], int]:
    """The completions with an answer whose messages can be read, and how many have one and cannot."""
    answered = [one for one in recent if one.finished and one.choices and one.choices[0].text.strip()]
    kept = [one for one in answered if is_readable(one.messages)]
    return kept, len(answered) - len(kept)


def samples(
    references: Iterable[Json],
    rows: Mapping[str, Row],
    completion: Callable[[str], Completion],
    stored: LoadImage,
    named: LoadImage,
) -> list[tuple[Json, CalibrationSample]]:
    """Each reference that still exists and can be read with its conversation, its answer last.

    `rows` are the snapshot's by their ids. `stored` gives the pictures of captured conversations, `named` those of a
    recipe's rows.
    """
    found = []
    for reference in references:
        if "messages" in reference:  # a row of a recipe's data, which is nobody's to delete
            shown, cut = list(reference["messages"]), bool(reference["cut"])
            found.append(({"row": reference["row"]}, _sample(shown, cut, named)))
            continue
        captured = _captured(reference, rows, completion)
        if captured is not None:
            found.append((reference, _sample(*captured, stored)))
    return found


def fingerprint(messages: Sequence[Any]) -> str:
    """SHA-256 of a conversation, for the manifest: pictures are in it by their own hashes."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _captured(
    reference: Json, rows: Mapping[str, Row], completion: Callable[[str], Completion]
) -> tuple[list[Json], bool] | None:
    """What a user asked and was answered, and whether the answer was cut; None when it is gone or unreadable."""
    if "completion" not in reference:
        row = rows.get(reference.get("preference") or reference["feedback"])
        if row is None:
            return None
        messages = row.messages
        text, cut = (row.answer, row.cut) if isinstance(row, Thumb) else (row.chosen, row.chosen_cut)
    else:
        try:
            kept = completion(reference["completion"])
        except NotFound:
            return None
        first = kept.choices[0]
        messages, text, cut = kept.messages, first.text, first.finish_reason == "length"
    return ([*messages, {"role": "assistant", "content": text}], cut) if is_readable(messages) else None


def _sample(messages: list[Json], cut: bool, load_image: LoadImage) -> CalibrationSample:
    return CalibrationSample(messages, [load_image(one) for one in image_references(messages)], cut)


def _good(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not isinstance(row, Thumb) or row.up]


def _of_row(row: Row) -> Json:
    return {"feedback": row.feedback_id} if isinstance(row, Thumb) else {"preference": row.preference_id}


def of_completion(completion: Completion) -> Json:
    """The reference that stands for a completion."""
    return {"completion": completion.id}


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]
