"""Which judgements a job trains on: one stated rule, deterministic, with every row counted.

Comes in: the store's rows `(Preference, Pair | None)`, or its thumbs. Goes out: a `Selection`, the frozen `Snapshot`.
Must not import torch or transformers.

The rule, in this order; every row lands in exactly one count:
1. `tie` and `both_bad` say nothing about a direction and are left out.
2. `unreadable`: a side's text is gone, or the prompt shows what was not stored: a picture by its address, a film.
   `empty`: a side is blank. `same_text`: both sides are the same.
3. Rows about the same two texts under one prompt are one question, and annotators vote on it: the newest judgement
   of an annotator is that annotator's vote (a newer tie withdraws it), an anonymous row is a voter of its own.
   The majority's direction wins; with equal votes nothing of the question is kept. Rows of another direction, or of
   an undecided question, are `contradictory`.
4. Of the rows in the winning direction the earliest is kept, the others are `duplicate`.
5. What only a look at the rendered texts can tell: `too_long`, where prompt plus the longer answer does not fit the
   model's training length, and `unreadable` again, where words spell a picture's placeholder.
6. The prompt's hash decides between `used` (training) and `held_out`, so a prompt is always on the same side.

Thumbs go the same way: the question is whether one text is a good answer to a prompt, its directions are up and down.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from noria.records import Json, Pair, Preference, Snapshot, Thumb
from train.data.render import is_readable

Row = tuple[Preference, Pair | None]
Judged = TypeVar("Judged", Pair, Thumb)
LEFT_OUT = ("tie", "both_bad", "unreadable", "empty", "same_text", "contradictory", "duplicate", "too_long")
LEFT_OUT_THUMBS = ("unreadable", "empty", "contradictory", "duplicate", "too_long")


@dataclass(frozen=True)
class Selection(Generic[Judged]):
    """What the rule kept, oldest first, and the ids of the rest.

    `counts` has `total`, `used`, `held_out` and one entry per LEFT_OUT reason.
    """

    train: tuple[Judged, ...]
    held_out: tuple[Judged, ...]
    left_out: tuple[str, ...]
    counts: dict[str, int]


def select(
    rows: Iterable[Row], *, held_out: float, unfit: Callable[[Pair], str | None] = lambda pair: None
) -> Selection[Pair]:
    """Applies the rule above to preferences. `held_out` is a share of prompts (0..1).

    `unfit` gives a LEFT_OUT reason or None, and is asked only of rows that the rule would keep.

    `counts["total"]` is the sum of all the other counts.
    """
    ordered = sorted(rows, key=lambda row: (row[0].created_at, row[0].id))
    counts: Counter[str] = Counter(dict.fromkeys(("used", "held_out", *LEFT_OUT), 0))
    questions: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    withdrawn = _withdrawn(ordered)
    for preference, pair in ordered:
        reason = _unusable(preference, pair)
        if reason is not None:
            counts[reason] += 1
        elif preference.id in withdrawn:
            counts["contradictory"] += 1
        elif pair is not None:
            low, high = sorted((pair.chosen, pair.rejected))
            questions[(pair.prompt_hash, low, high)].append(pair)
    ids = [preference.id for preference, _ in ordered]
    return _settled(questions.values(), lambda pair: pair.chosen, ids, counts, held_out, unfit)


def select_thumbs(
    thumbs: Iterable[Thumb], *, held_out: float, unfit: Callable[[Thumb], str | None] = lambda thumb: None
) -> Selection[Thumb]:
    """Applies the rule above to thumbs; arguments and counts as of `select`."""
    ordered = sorted(thumbs, key=lambda thumb: (thumb.created_at, thumb.feedback_id))
    counts: Counter[str] = Counter(dict.fromkeys(("used", "held_out", *LEFT_OUT_THUMBS), 0))
    questions: dict[tuple[str, str], list[Thumb]] = defaultdict(list)
    for thumb in ordered:
        if not is_readable(thumb.messages):
            counts["unreadable"] += 1
        elif not thumb.answer.strip():
            counts["empty"] += 1
        else:
            questions[(thumb.prompt_hash, thumb.answer)].append(thumb)
    ids = [thumb.feedback_id for thumb in ordered]
    return _settled(questions.values(), lambda thumb: "up" if thumb.up else "down", ids, counts, held_out, unfit)


def judgement_id(one: Pair | Thumb) -> str:
    """The id of the preference or of the feedback that the row stands for."""
    return one.preference_id if isinstance(one, Pair) else one.feedback_id


def is_held_out(prompt_hash: str, share: float) -> bool:
    """Whether this prompt is on the held-out side: its hash read as a number in [0, 1) is below `share`."""
    digest = hashlib.sha256(f"held-out:{prompt_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def freeze(selection: Selection[Judged], *, job_id: str, created_at: float) -> Snapshot:
    """The selection as a record. The id is its content: the same store content gives the same id, whatever the job."""
    return Snapshot(
        id=f"snap_{content_hash(selection)[:24]}",
        job_id=job_id,
        created_at=created_at,
        train=tuple(map(judgement_id, selection.train)),
        held_out=tuple(map(judgement_id, selection.held_out)),
        counts=dict(selection.counts),
        left_out=selection.left_out,
    )


def canonical(selection: Selection[Judged]) -> Json:
    """The content that is hashed: kept ids with the digest of their prompt and texts, the other ids, the counts."""
    return {
        "train": [[judgement_id(one), row_digest(one)] for one in selection.train],
        "held_out": [[judgement_id(one), row_digest(one)] for one in selection.held_out],
        "left_out": sorted(selection.left_out),
        "counts": dict(sorted(selection.counts.items())),
    }


def content_hash(selection: Selection[Judged]) -> str:
    """SHA-256 over every kept row's id and texts, and the counts."""
    return _sha256(canonical(selection))


def row_digest(one: Pair | Thumb) -> str:
    """SHA-256 of what a row says: prompt hash, texts, whether they were cut; of a thumb also its direction."""
    if isinstance(one, Pair):
        return _sha256([one.prompt_hash, one.chosen, one.rejected, one.chosen_cut, one.rejected_cut])
    return _sha256([one.prompt_hash, one.answer, one.up, one.cut])


def _settled(
    questions: Iterable[list[Judged]],
    direction: Callable[[Judged], str],
    ids: list[str],
    counts: Counter[str],
    held_out: float,
    unfit: Callable[[Judged], str | None],
) -> Selection[Judged]:
    """Votes on each question and puts what is kept on its side; `ids` are those of all rows, oldest first."""
    kept: list[Judged] = []
    for question in questions:
        winner, contradictory, duplicate = _vote(question, direction)
        counts["contradictory"] += contradictory
        counts["duplicate"] += duplicate
        if winner is None:
            continue
        if (reason := unfit(winner)) is not None:
            counts[reason] += 1
        else:
            kept.append(winner)
    kept.sort(key=lambda one: (one.created_at, judgement_id(one)))
    aside = tuple(one for one in kept if is_held_out(one.prompt_hash, held_out))
    train = tuple(one for one in kept if not is_held_out(one.prompt_hash, held_out))
    counts["used"], counts["held_out"] = len(train), len(aside)
    taken = set(map(judgement_id, kept))
    return Selection(train, aside, tuple(id_ for id_ in ids if id_ not in taken), {"total": len(ids), **counts})


def _unusable(preference: Preference, pair: Pair | None) -> str | None:
    if preference.verdict != "chosen":
        return preference.verdict
    if pair is None or not is_readable(pair.messages):
        return "unreadable"
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty"
    return "same_text" if pair.chosen.strip() == pair.rejected.strip() else None


def _withdrawn(ordered: list[Row]) -> set[str]:
    """Ids of directed judgements that the same annotator later replaced by a tie or both-bad on the same sides."""
    newest: dict[tuple[str, frozenset[str]], Preference] = {}
    for preference, _ in ordered:
        if preference.annotator is not None:
            newest[(preference.annotator, _sides(preference))] = preference
    return {
        preference.id
        for preference, _ in ordered
        if preference.annotator is not None
        and preference.verdict == "chosen"
        and newest[(preference.annotator, _sides(preference))].verdict != "chosen"
    }


def _sides(preference: Preference) -> frozenset[str]:
    sides = (preference.chosen.to_wire(), preference.rejected.to_wire())
    return frozenset(json.dumps(side, sort_keys=True) for side in sides)


def _vote(question: list[Judged], direction: Callable[[Judged], str]) -> tuple[Judged | None, int, int]:
    """The row to keep or None, and how many rows of this question are contradictory and duplicate."""
    votes: dict[str, Judged] = {}
    for row in question:  # oldest first, so the newest judgement of an annotator stays
        voter = f"annotator:{row.annotator}" if row.annotator is not None else f"row:{judgement_id(row)}"
        votes[voter] = row
    (best, most), *others = Counter(direction(row) for row in votes.values()).most_common()
    if others and others[0][1] == most:
        return None, len(question), 0
    winning = [row for row in question if direction(row) == best]
    return winning[0], len(question) - len(winning), len(winning) - 1


def _sha256(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
