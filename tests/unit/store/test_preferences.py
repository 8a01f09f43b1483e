"""Preferences: every refusal, repetition, training pairs, snapshots and what counts as used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from noria.errors import InvalidRequest, NoriaError, NotFound
from noria.records import BLOB_SCHEME, Choice, Pair, Side, Snapshot
from noria.store import Store
from tests.unit.store.conftest import Clock
from tests.unit.store.samples import PICTURE, completion

ONE, TWO = Side("c1", 0), Side("c1", 1)


@pytest.fixture
def judged(store: Store) -> Store:
    """A store with two completions of one prompt and one of another."""
    store.add_completions([completion("c1"), completion("c2", ("short", "third")), completion("c3", prompt_hash="p2")])
    return store


def test_a_preference_comes_back_as_recorded(judged: Store, clock: Clock) -> None:
    clock.now = 77.5
    made, created = judged.add_preference(ONE, Side("c2", 1), annotator="u-17", comment="clear")
    assert created
    assert made.id.startswith("pref_")
    assert len(made.id) == len("pref_") + 24
    assert (made.created_at, made.prompt_hash, made.verdict, made.source) == (77.5, "p1", "chosen", "preference")
    assert judged.get_preference(made.id) == made
    assert judged.list_preferences() == [made]


@pytest.mark.parametrize(
    ("chosen", "rejected", "verdict", "error", "param", "says"),
    [
        (Side("nope", 0), TWO, "chosen", NotFound, "chosen.completion_id", "'nope'"),
        (ONE, Side("nope", 0), "chosen", NotFound, "rejected.completion_id", "'nope'"),
        (Side("c1", 7), TWO, "chosen", InvalidRequest, "chosen.index", "index=7 .* 2 choices"),
        (ONE, Side("c1", -1), "chosen", InvalidRequest, "rejected.index", "index=-1 .* 2 choices"),
        (ONE, Side("c1", 2**80), "chosen", InvalidRequest, "rejected.index", "out of range"),
        (ONE, Side("c1"), "chosen", InvalidRequest, "rejected.index", "missing"),
        (ONE, ONE, "chosen", InvalidRequest, "rejected", "the same answer"),
        (ONE, ONE, "tie", InvalidRequest, "rejected", "the same answer"),
        (ONE, Side("c2", 0), "chosen", InvalidRequest, "rejected", "the same text"),
        (ONE, Side(text="short"), "chosen", InvalidRequest, "rejected", "the same text"),
        (ONE, Side("c3", 1), "chosen", InvalidRequest, "rejected.completion_id", "different prompts"),
        (Side(text="a"), Side(text="b"), "chosen", InvalidRequest, "chosen.completion_id", "must name a completion"),
        (ONE, Side(), "chosen", InvalidRequest, "rejected", "needs either"),
        (ONE, Side(text="  "), "chosen", InvalidRequest, "rejected", "needs either"),
        (ONE, Side("c1", 1, "both"), "chosen", InvalidRequest, "rejected", "both"),
        (ONE, TWO, "better", InvalidRequest, "verdict", "'better'"),
    ],
)
def test_refusals_name_the_field_and_write_nothing(
    judged: Store, chosen: Side, rejected: Side, verdict: Any, error: type[NoriaError], param: str, says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        judged.add_preference(chosen, rejected, verdict)
    assert refused.value.param == param
    assert judged.preference_counts() == {"total": 0, "unused": 0}


def test_ties_may_have_equal_texts(judged: Store) -> None:
    made, created = judged.add_preference(ONE, Side("c2", 0), "tie")
    assert created
    assert made.verdict == "tie"


def test_answers_that_differ_in_tool_calls_only_can_be_compared(store: Store) -> None:
    answers = tuple(Choice(i, "", {"tool_calls": [{"function": {"name": name}}]}) for i, name in enumerate("ab"))
    store.add_completions([completion("c1", choices=answers)])
    assert store.add_preference(ONE, TWO)[1]


def test_saying_it_again_gives_the_same_preference(judged: Store) -> None:
    first, _ = judged.add_preference(ONE, TWO, annotator="u-1")
    assert judged.add_preference(ONE, TWO, annotator="u-1") == (first, False)
    assert judged.add_preference(ONE, TWO, annotator="u-2")[1]
    anonymous, created = judged.add_preference(ONE, TWO)
    assert created
    assert judged.add_preference(ONE, TWO) == (anonymous, False)
    assert judged.preference_counts()["total"] == 3


def test_a_changed_mind_is_new_and_so_is_changing_back(judged: Store) -> None:
    ids = [
        judged.add_preference(ONE, TWO, annotator="u")[0].id,
        judged.add_preference(TWO, ONE, annotator="u")[0].id,
        judged.add_preference(ONE, TWO, annotator="u")[0].id,
        judged.add_preference(ONE, TWO, "tie", annotator="u")[0].id,
    ]
    assert len(set(ids)) == 4
    tie, created = judged.add_preference(TWO, ONE, "tie", annotator="u")
    assert (tie.id, created) == (ids[3], False)


def test_lists_page_in_the_order_of_recording(judged: Store) -> None:
    ids = [judged.add_preference(ONE, TWO, annotator=f"u-{i}")[0].id for i in range(5)]
    assert [one.id for one in judged.list_preferences()] == ids[::-1]
    assert [one.id for one in judged.list_preferences(order="asc", after=ids[1], limit=2)] == ids[2:4]
    assert [one.id for one in judged.list_preferences(after=ids[1])] == ids[:1]
    assert [one.id for one in judged.list_preferences(annotator="u-3")] == [ids[3]]
    assert [one.id for one in judged.iter_preferences()] == ids
    with pytest.raises(NotFound, match="after='nope'"):
        judged.list_preferences(after="nope")


def test_deleting_twice_is_not_found(judged: Store) -> None:
    made, _ = judged.add_preference(ONE, TWO)
    judged.delete_preference(made.id)
    for call in (judged.delete_preference, judged.get_preference):
        with pytest.raises(NotFound, match=made.id):
            call(made.id)


def test_training_pairs_resolve_texts_messages_and_images(store: Store) -> None:
    url = BLOB_SCHEME + PICTURE.sha256
    shown = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
    }
    store.add_completions([completion("c1", messages=(shown,), images=(PICTURE,)), completion("c2", ("third",))])
    compared, _ = store.add_preference(TWO, Side("c2", 0), annotator="u")
    edited, _ = store.add_preference(Side(text="edited"), ONE)
    tied, _ = store.add_preference(ONE, TWO, "tie")
    pairs = store.training_pairs()
    assert [preference for preference, _ in pairs] == [compared, edited, tied]
    seen: Any = {"messages": (shown,), "images": (url,), "prompt_hash": "p1", "created_at": 1000.0}
    assert [pair for _, pair in pairs] == [
        Pair(preference_id=compared.id, chosen="a longer answer", rejected="third", annotator="u", **seen),
        Pair(preference_id=edited.id, chosen="edited", rejected="short", **seen),
        None,
    ]


def test_a_training_pair_says_which_answers_their_limit_of_tokens_cut(store: Store) -> None:
    answers = completion("c1", ("cut here", "whole", "streamed away"))
    reasons = ("length", "stop", None)
    choices = tuple(replace(one, finish_reason=why) for one, why in zip(answers.choices, reasons, strict=True))
    store.add_completions([replace(answers, choices=choices)])
    cut, whole, lost = (Side("c1", index) for index in range(3))
    for chosen, rejected in ((cut, whole), (whole, cut), (Side(text="cut here, not"), cut), (lost, whole)):
        store.add_preference(chosen, rejected)
    found = [pair for _, pair in store.training_pairs() if pair is not None]
    assert [(one.chosen_cut, one.rejected_cut) for one in found] == [
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]


def test_only_running_and_succeeded_jobs_use_preferences(judged: Store) -> None:
    kept, held, dropped, fresh = (judged.add_preference(ONE, TWO, annotator=f"u-{i}")[0].id for i in range(4))
    judged.add_preference(ONE, TWO, "tie", annotator="u-9")
    assert judged.preference_counts() == {"total": 5, "unused": 4}
    failed = judged.create_job("dpo")
    judged.claim_job("me", 60)
    snapshot = Snapshot("snap_1", failed.id, 5.0, (kept,), (held,), {"used": 1}, (dropped,))
    judged.add_snapshot(snapshot)
    assert judged.get_snapshot("snap_1") == snapshot
    assert judged.preference_counts() == {"total": 5, "unused": 1}
    judged.finish_job(failed.id, "me", "failed")
    assert judged.preference_counts() == {"total": 5, "unused": 4}

    again = judged.create_job("dpo")
    judged.claim_job("me", 60)
    judged.add_snapshot(Snapshot("snap_1", again.id, 6.0, (kept,), (held,), {"used": 1}, (dropped,)))
    judged.finish_job(again.id, "me", "succeeded")
    assert judged.get_snapshot("snap_1") == snapshot
    assert judged.preference_counts() == {"total": 5, "unused": 1}
    assert [p.id for p, pair in judged.training_pairs(exclude_used=True) if pair] == [fresh]


def test_a_snapshot_outlives_its_preferences(judged: Store) -> None:
    made, _ = judged.add_preference(ONE, TWO)
    judged.add_snapshot(Snapshot("snap_2", "job_1", 5.0, (made.id,), (), {}))
    judged.delete_preference(made.id)
    assert judged.get_snapshot("snap_2").train == (made.id,)
    with pytest.raises(NotFound, match="snap_3"):
        judged.get_snapshot("snap_3")


def test_an_exported_preference_is_taken_in_once_with_its_id_and_time(judged: Store, clock: Clock) -> None:
    made, _ = judged.add_preference(ONE, TWO, annotator="u")
    judged.delete_preference(made.id)
    clock.now += 500
    assert judged.import_preference(made)
    assert not judged.import_preference(made)
    assert judged.list_preferences() == [made]
    with pytest.raises(NotFound, match="'nope'"):
        judged.import_preference(replace(made, id="pref_x", chosen=Side("nope", 0)))
