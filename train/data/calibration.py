"""Which conversations GPTQ is calibrated on, and which ones the artefact is verified on.

Comes in: the snapshot's pairs and recent completions. Goes out: references that a restart finds again, and the
samples themselves. References and not texts are kept: what a user has deleted since is left out. So is what shows
anything but text and stored pictures.
Must not import torch.

The recipe: chosen answers of training pairs first, evenly spread over them, since that is what the new policy is to
say; recent finished answers to prompts of the training side fill up. Verification takes held-out pairs; where there
are too few, recent conversations that calibration did not take; where none are left, calibration's own, and says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from noria.errors import NotFound
from noria.records import Completion, Json, Pair, image_references
from train.data.render import is_readable
from train.data.samples import LoadImage
from train.export.rendering import CalibrationSample

RECIPE = "chosen answers of training pairs, evenly spread, then recent completions of prompts that are not held out"


def choose(
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    recent: Sequence[Completion],
    counts: tuple[int, int],
    aside: Callable[[str], bool],
) -> Json:
    """References for calibration and verification; `counts` is how many of each are wanted.

    `aside` says of a prompt's hash that it is held out: calibration never sees such a prompt.
    """
    wanted, checked = counts
    half = wanted if not recent else max(1, (wanted + 1) // 2)
    calibration = [_of_pair(pair) for pair in _spread(train, half)]
    answered, unreadable = usable(recent)
    others = [of_completion(one) for one in answered]
    calibration += [of_completion(one) for one in answered if not aside(one.prompt_hash)][: wanted - len(calibration)]
    calibration += [_of_pair(pair) for pair in train if _of_pair(pair) not in calibration][: wanted - len(calibration)]
    fresh = [reference for reference in others if reference not in calibration]
    verification = [_of_pair(pair) for pair in _spread(held_out, checked)]
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
    pairs: dict[str, Pair],
    completion: Callable[[str], Completion],
    stored: LoadImage,
    named: LoadImage,
) -> list[tuple[Json, CalibrationSample]]:
    """Each reference that still exists and can be read with its conversation, its answer last.

    `stored` gives the pictures of captured conversations, `named` those of a recipe's rows.
    """
    found = []
    for reference in references:
        if "messages" in reference:  # a row of a recipe's data, which is nobody's to delete
            shown, cut = list(reference["messages"]), bool(reference["cut"])
            found.append(({"row": reference["row"]}, _sample(shown, cut, named)))
            continue
        captured = _captured(reference, pairs, completion)
        if captured is not None:
            found.append((reference, _sample(*captured, stored)))
    return found


def fingerprint(messages: Sequence[Any]) -> str:
    """SHA-256 of a conversation, for the manifest: pictures are in it by their own hashes."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _captured(
    reference: Json, pairs: dict[str, Pair], completion: Callable[[str], Completion]
) -> tuple[list[Json], bool] | None:
    """What a user asked and was answered, and whether the answer was cut; None when it is gone or unreadable."""
    if "preference" in reference:
        pair = pairs.get(reference["preference"])
        if pair is None:
            return None
        messages, text, cut = pair.messages, pair.chosen, pair.chosen_cut
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


def _of_pair(pair: Pair) -> Json:
    return {"preference": pair.preference_id}


def of_completion(completion: Completion) -> Json:
    """The reference that stands for a completion."""
    return {"completion": completion.id}


def _spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    if len(pairs) <= count:
        return list(pairs)
    return [pairs[index * len(pairs) // count] for index in range(count)]
