"""The snapshot's rule: who trains, who is held out, who is left out and under which count."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from noria.records import BLOB_SCHEME, Json, Pair, Preference, Side, Thumb, Verdict
from train.data.snapshot import (
    LEFT_OUT,
    LEFT_OUT_THUMBS,
    Row,
    content_hash,
    freeze,
    is_held_out,
    row_digest,
    select,
    select_thumbs,
)


def row(
    number: int,
    chosen: str = "good",
    rejected: str = "bad",
    *,
    prompt: str = "p0",
    annotator: str | None = "ann",
    verdict: Verdict = "chosen",
    readable: bool = True,
) -> Row:
    """Judgement `number`, made at second `number`; the sides are choices of one completion per prompt."""
    sides = (Side(text=chosen), Side(text=rejected))
    preference = Preference(f"pref_{number:03}", float(number), prompt, *sides, verdict, annotator)
    if verdict != "chosen" or not readable:
        return preference, None
    messages = ({"role": "user", "content": prompt},)
    return preference, Pair(preference.id, prompt, messages, chosen, rejected, float(number), annotator)


def kept(rows: list[Row]) -> list[str]:
    return [pair.preference_id for pair in select(rows, held_out=0.0).train]


def nonzero(rows: list[Row]) -> dict[str, int]:
    return {reason: n for reason, n in select(rows, held_out=0.0).counts.items() if n}


def test_ties_and_both_bad_are_left_out_and_counted() -> None:
    rows = [row(1), row(2, "a", "b", verdict="tie"), row(3, "a", "b", verdict="both_bad")]
    assert kept(rows) == ["pref_001"]
    assert nonzero(rows) == {"total": 3, "used": 1, "tie": 1, "both_bad": 1}


def test_duplicates_keep_the_earliest() -> None:
    rows = [row(3, annotator="b"), row(1, annotator="a"), row(2, annotator="c")]
    assert kept(rows) == ["pref_001"]
    assert nonzero(rows) == {"total": 3, "used": 1, "duplicate": 2}


def test_the_same_texts_under_another_prompt_are_no_duplicate() -> None:
    assert kept([row(1), row(2, prompt="p1")]) == ["pref_001", "pref_002"]


def test_the_newest_judgement_of_one_annotator_wins() -> None:
    rows = [row(1, "x", "y"), row(2, "y", "x")]
    assert kept(rows) == ["pref_002"]
    assert nonzero(rows) == {"total": 2, "used": 1, "contradictory": 1}


def test_an_annotator_who_comes_back_to_the_first_judgement_keeps_the_earliest_row() -> None:
    rows = [row(1, "x", "y"), row(2, "y", "x"), row(3, "x", "y")]
    assert kept(rows) == ["pref_001"]
    assert nonzero(rows) == {"total": 3, "used": 1, "contradictory": 1, "duplicate": 1}


def test_a_later_tie_withdraws_the_same_annotators_judgement() -> None:
    rows = [row(1, "x", "y"), row(2, "y", "x", verdict="tie"), row(3, "v", "w")]
    assert kept(rows) == ["pref_003"]
    assert nonzero(rows) == {"total": 3, "used": 1, "tie": 1, "contradictory": 1}


def test_a_majority_of_annotators_decides() -> None:
    rows = [row(1, "x", "y", annotator="a"), row(2, "y", "x", annotator="b"), row(3, "x", "y", annotator="c")]
    assert kept(rows) == ["pref_001"]
    assert nonzero(rows) == {"total": 3, "used": 1, "contradictory": 1, "duplicate": 1}


def test_equal_votes_leave_both_out() -> None:
    rows = [row(1, "x", "y", annotator="a"), row(2, "y", "x", annotator="b")]
    assert kept(rows) == []
    assert nonzero(rows) == {"total": 2, "contradictory": 2}


def test_one_annotator_has_one_vote_and_anonymous_rows_one_each() -> None:
    stubborn = [row(n, "x", "y", annotator="a") for n in (1, 2, 3)]
    anonymous = [row(n, "y", "x", annotator=None) for n in (4, 5)]
    assert kept([*stubborn, *anonymous]) == ["pref_004"]


def test_unusable_texts_are_left_out_by_reason() -> None:
    rows = [row(1, "", "b"), row(2, "a", "  "), row(3, "same", "same "), row(4, readable=False), row(5)]
    assert kept(rows) == ["pref_005"]
    assert nonzero(rows) == {"total": 5, "used": 1, "empty": 2, "same_text": 1, "unreadable": 1}


def test_a_pair_that_is_too_long_is_left_out() -> None:
    selection = select(
        [row(1, "long" * 9, "x"), row(2)], held_out=0.0, unfit=lambda pair: "too_long" if len(pair.chosen) > 8 else None
    )
    assert [pair.preference_id for pair in selection.train] == ["pref_002"]
    assert selection.left_out == ("pref_001",)
    assert selection.counts["too_long"] == 1


def test_a_prompt_is_always_on_the_same_side() -> None:
    rows = [row(n, f"good {n}", "bad", prompt=f"p{n % 40}") for n in range(200)]
    selection = select(rows, held_out=0.3)
    aside = {pair.prompt_hash for pair in selection.held_out}
    assert aside.isdisjoint(pair.prompt_hash for pair in selection.train)
    assert aside == {f"p{n}" for n in range(40) if is_held_out(f"p{n}", 0.3)}
    later = select(rows[:50], held_out=0.3)
    assert {pair.prompt_hash for pair in later.held_out} <= aside


def test_a_larger_share_holds_out_a_superset() -> None:
    prompts = [f"p{n}" for n in range(1000)]
    small = {prompt for prompt in prompts if is_held_out(prompt, 0.1)}
    assert small <= {prompt for prompt in prompts if is_held_out(prompt, 0.4)}
    assert 70 <= len(small) <= 130
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts)


def test_the_snapshot_is_its_content() -> None:
    rows = [row(n, f"good {n}", "bad", prompt=f"p{n}") for n in range(20)]
    first = freeze(select(rows, held_out=0.2), job_id="job_1", created_at=1.0)
    shuffled = rows[7:] + rows[:7][::-1]
    second = freeze(select(shuffled, held_out=0.2), job_id="job_2", created_at=2.0)
    assert (first.id, first.train, first.held_out, first.counts) == (
        second.id,
        second.train,
        second.held_out,
        second.counts,
    )
    assert first.id.startswith("snap_")
    assert len(first.id) == len("snap_") + 24
    changed = [(rows[0][0], dataclasses.replace(rows[0][1], chosen="other") if rows[0][1] else None), *rows[1:]]
    assert content_hash(select(changed, held_out=0.2)) != content_hash(select(rows, held_out=0.2))


def test_a_pairs_digest_covers_prompt_and_both_texts() -> None:
    _, pair = row(1)
    assert pair is not None
    replace = dataclasses.replace
    others = [replace(pair, prompt_hash="z"), replace(pair, chosen="z"), replace(pair, rejected="z")]
    assert len({row_digest(one) for one in [pair, *others]}) == 4


ROWS = st.lists(
    st.builds(
        row,
        number=st.integers(0, 10_000),
        chosen=st.sampled_from(["a", "b", "c", "", "a long answer"]),
        rejected=st.sampled_from(["a", "b", "c", " "]),
        prompt=st.sampled_from(["p0", "p1", "p2", "p3"]),
        annotator=st.sampled_from([None, "x", "y", "z"]),
        verdict=st.sampled_from(["chosen", "chosen", "chosen", "tie", "both_bad"]),
        readable=st.booleans(),
    ),
    unique_by=lambda one: one[0].id,
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, share=st.floats(0, 0.8), turn=st.integers(0, 40))
def test_counts_add_up_and_order_does_not_matter(rows: list[Row], share: float, turn: int) -> None:
    def unfit(pair: Pair) -> str | None:
        return "too_long" if len(pair.chosen) > 5 else None

    selection = select(rows, held_out=share, unfit=unfit)
    counts = selection.counts
    assert counts["total"] == len(rows) == sum(counts[key] for key in ("used", "held_out", *LEFT_OUT))
    ids = [pair.preference_id for pair in (*selection.train, *selection.held_out)]
    assert sorted([*ids, *selection.left_out]) == sorted(preference.id for preference, _ in rows)
    questions = [frozenset((pair.prompt_hash, pair.chosen, pair.rejected)) for pair in selection.train]
    assert len(set(questions)) == len(questions)
    moved = rows[turn:][::-1] + rows[:turn]
    assert select(moved, held_out=share, unfit=unfit) == selection


def thumb(number: int, up: bool = True, answer: str = "good", **more: Any) -> Thumb:
    """Thumb `number`, given at second `number`."""
    values = {"prompt_hash": "p0", "messages": ({"role": "user", "content": "p0"},), "annotator": "ann", **more}
    return Thumb(f"fb_{number:03}", answer=answer, up=up, created_at=float(number), **values)


def told(rows: list[Thumb], held_out: float = 0.0) -> tuple[list[tuple[str, bool]], dict[str, int]]:
    """Ids and directions of what is kept, and the counts that are not 0."""
    found = select_thumbs(rows, held_out=held_out)
    return [(one.feedback_id, one.up) for one in found.train], {name: n for name, n in found.counts.items() if n}


def test_a_thumb_on_each_answer_is_kept() -> None:
    """Two answers to one prompt are two questions, and so is one text under two prompts."""
    rows = [thumb(1), thumb(2, False, "bad"), thumb(3, False, prompt_hash="p1")]
    kept = [("fb_001", True), ("fb_002", False), ("fb_003", False)]
    assert told(rows) == (kept, {"total": 3, "used": 3})


def test_annotators_vote_on_an_answer_and_their_newest_thumb_counts() -> None:
    assert told([thumb(1), thumb(2, False)]) == ([("fb_002", False)], {"total": 2, "used": 1, "contradictory": 1})
    others = [thumb(3, annotator="b"), thumb(4, annotator="c"), thumb(5, False, annotator="d")]
    assert told(others) == ([("fb_003", True)], {"total": 3, "used": 1, "duplicate": 1, "contradictory": 1})
    split = [thumb(1, annotator=None), thumb(2, False, annotator=None)]
    assert told(split) == ([], {"total": 2, "contradictory": 2})


def test_blank_and_unreadable_answers_are_left_out_and_counted() -> None:
    far: Json = {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}
    near: Json = {"type": "image_url", "image_url": {"url": BLOB_SCHEME + "a" * 64}}
    rows = [
        thumb(1, answer=" "),
        *(thumb(n, messages=({"role": "user", "content": [p]},)) for n, p in ((2, far), (3, near))),
    ]
    assert told(rows) == ([("fb_003", True)], {"total": 3, "used": 1, "empty": 1, "unreadable": 1})
    long = select_thumbs(
        [thumb(1), thumb(2, answer="x")], held_out=0.0, unfit=lambda one: "too_long" if one.answer == "x" else None
    )
    assert (long.counts["too_long"], long.left_out) == (1, ("fb_002",))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from("pqr"), st.sampled_from(["x", None]))))
@settings(max_examples=60, deadline=None)
def test_every_thumb_lands_in_one_count_and_a_prompt_on_one_side(
    drawn: list[tuple[bool, str, str, str | None]],
) -> None:
    rows = [
        thumb(n, up, answer, prompt_hash=prompt, annotator=who) for n, (up, answer, prompt, who) in enumerate(drawn)
    ]
    found = select_thumbs(rows, held_out=0.5)
    assert set(found.counts) == {"total", "used", "held_out", *LEFT_OUT_THUMBS}
    assert found.counts["total"] == len(rows) == sum(n for name, n in found.counts.items() if name != "total")
    assert len(found.left_out) + len(found.train) + len(found.held_out) == len(rows)
    assert {one.prompt_hash for one in found.train}.isdisjoint(one.prompt_hash for one in found.held_out)
    assert select_thumbs(reversed(rows), held_out=0.5) == found


def test_a_snapshot_of_thumbs_is_its_content() -> None:
    rows = [thumb(1), thumb(2, False, "bad")]
    frozen = freeze(select_thumbs(rows, held_out=0.0), job_id="job_1", created_at=5.0)
    assert (frozen.train, frozen.id[:5]) == (("fb_001", "fb_002"), "snap_")
    changed = [dataclasses.replace(rows[0], up=False), dataclasses.replace(rows[0], cut=True)]
    assert len({row_digest(one) for one in [rows[0], *changed, rows[1]]}) == 4
    other = freeze(select_thumbs([changed[1], rows[1]], held_out=0.0), job_id="job_1", created_at=5.0)
    assert other.id != frozen.id
