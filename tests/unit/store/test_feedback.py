"""Feedback, the preferences that edits make, and forgetting an end user."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from noria.errors import InvalidRequest, NoriaError, NotFound
from noria.records import BLOB_SCHEME, Side, Snapshot, Thumb
from noria.store import Store
from tests.unit.store.samples import PICTURE, completion


@pytest.fixture
def answered(store: Store) -> Store:
    """A store with one completion."""
    store.add_completions([completion("c1")])
    return store


def test_feedback_comes_back_as_recorded(answered: Store) -> None:
    said = answered.add_feedback("c1", 1, rating=4, thumb="up", comment="good", annotator="u-1")
    assert said.id.startswith("fb_")
    assert (said.index, said.rating, said.thumb, said.comment, said.annotator) == (1, 4, "up", "good", "u-1")
    assert said.preference_id is None
    assert answered.get_feedback(said.id) == said
    assert answered.preference_counts()["total"] == 0


def test_an_edit_is_also_a_preference_over_the_original(answered: Store) -> None:
    said = answered.add_feedback("c1", 0, edit="better", annotator="u-1")
    assert said.preference_id is not None
    made = answered.get_preference(said.preference_id)
    assert (made.chosen, made.rejected) == (Side(text="better"), Side("c1", 0))
    assert (made.source, made.annotator, made.prompt_hash) == ("edit", "u-1", "p1")


@pytest.mark.parametrize(
    ("completion_id", "index", "content", "error", "param"),
    [
        ("nope", 0, {"thumb": "up"}, NotFound, "completion_id"),
        ("c1", 2, {"thumb": "up"}, InvalidRequest, "index"),
        ("c1", 0, {}, InvalidRequest, "rating"),
        ("c1", 0, {"rating": 0}, InvalidRequest, "rating"),
        ("c1", 0, {"rating": 6}, InvalidRequest, "rating"),
        ("c1", 0, {"thumb": "sideways"}, InvalidRequest, "thumb"),
        ("c1", 0, {"edit": " "}, InvalidRequest, "edit"),
        ("c1", 0, {"edit": "short"}, InvalidRequest, "edit"),
    ],
)
def test_refusals_name_the_field_and_write_nothing(
    answered: Store, completion_id: str, index: int, content: dict[str, Any], error: type[NoriaError], param: str
) -> None:
    with pytest.raises(error) as refused:
        answered.add_feedback(completion_id, index, **content)
    assert refused.value.param == param
    assert answered.list_feedback() == []
    assert answered.preference_counts()["total"] == 0


def test_deleting_feedback_takes_the_preference_that_only_it_made(answered: Store) -> None:
    first = answered.add_feedback("c1", 0, edit="better", annotator="u-1")
    second = answered.add_feedback("c1", 0, edit="better", rating=1, annotator="u-1")
    assert first.preference_id == second.preference_id
    answered.delete_feedback(first.id)
    assert answered.preference_counts()["total"] == 1
    answered.delete_feedback(second.id)
    assert answered.preference_counts()["total"] == 0
    with pytest.raises(NotFound, match=first.id):
        answered.delete_feedback(first.id)


def test_deleting_a_preference_leaves_its_feedback(answered: Store) -> None:
    said = answered.add_feedback("c1", 0, edit="better")
    assert said.preference_id is not None
    answered.delete_preference(said.preference_id)
    assert answered.get_feedback(said.id).preference_id is None


def test_lists_filter_and_page(answered: Store) -> None:
    answered.add_completions([completion("c2")])
    ids = [answered.add_feedback(c, 0, rating=3, annotator=a).id for c, a in (("c1", "x"), ("c2", "x"), ("c1", "y"))]
    assert [one.id for one in answered.list_feedback()] == ids[::-1]
    assert [one.id for one in answered.list_feedback(completion_id="c1", order="asc")] == [ids[0], ids[2]]
    assert [one.id for one in answered.list_feedback(annotator="x", after=ids[1])] == [ids[0]]


def test_forgetting_an_end_user_leaves_nothing_of_them(store: Store) -> None:
    store.add_completions(
        [
            completion("mine", end_user="u-1", images=(PICTURE,), metadata={"k": "v"}),
            completion("shared", end_user="u-2"),
            completion("own", end_user="u-2"),
        ]
    )
    store.add_preference(Side("mine", 0), Side("mine", 1), annotator="u-2")
    store.add_preference(Side("own", 0), Side("own", 1), annotator="u-1")
    kept, _ = store.add_preference(Side("own", 0), Side("own", 1), annotator="u-2")
    store.add_feedback("shared", 0, edit="what u-1 wrote", annotator="u-1")
    opinion = store.add_feedback("shared", 0, thumb="down", annotator="u-2")
    assert store.forget_end_user("u-1") == {
        "completions": 1,
        "choices": 2,
        "preferences": 3,
        "feedback": 1,
        "images": [PICTURE.sha256],
        "lineage": {"versions": [], "inherited": [], "jobs": []},
    }
    assert [one.id for one in store.list_completions()] == ["own", "shared"]
    assert store.list_preferences() == [kept]
    assert store.list_feedback() == [opinion]
    assert store.list_completions(metadata={"k": "v"}) == []
    assert store.forget_end_user("u-1")["completions"] == 0


def test_training_thumbs_have_the_answer_that_they_are_about(store: Store) -> None:
    """Ratings, edits and comments alone are none; an answer that its limit of tokens cut is told."""
    url = BLOB_SCHEME + PICTURE.sha256
    shown = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    answers = completion("c1", messages=(shown,), images=(PICTURE,))
    first, second = answers.choices
    cut = replace(second, finish_reason="length")
    store.add_completions([replace(answers, choices=(first, cut)), completion("c2", ("third",))])
    liked = store.add_feedback("c1", 1, thumb="up", annotator="u-1")
    store.add_feedback("c1", 0, rating=5, comment="good")
    disliked = store.add_feedback("c1", 0, thumb="down", edit="better")
    store.add_feedback("c2", 0, edit="another")
    seen: Any = {"prompt_hash": "p1", "messages": (shown,), "images": (url,), "created_at": 1000.0}
    assert store.training_thumbs() == [
        Thumb(liked.id, answer="a longer answer", up=True, annotator="u-1", cut=True, **seen),
        Thumb(disliked.id, answer="short", up=False, **seen),
    ]
    assert store.thumb_counts() == {"total": 2, "unused": 2}


def test_only_running_and_succeeded_jobs_use_thumbs(answered: Store) -> None:
    """And a thumb that was deleted is gone from what trains, not from the snapshot."""
    kept, held, fresh = (answered.add_feedback("c1", 0, thumb="up", annotator=f"u-{n}").id for n in range(3))
    job = answered.create_job("kto")
    answered.claim_job("me", 60)
    snapshot = Snapshot("snap_1", job.id, 5.0, (kept,), (held,), {"used": 1})
    answered.add_snapshot(snapshot)
    assert answered.thumb_counts() == {"total": 3, "unused": 1}
    assert [one.feedback_id for one in answered.training_thumbs(exclude_used=True)] == [fresh]
    assert len(answered.training_thumbs()) == 3
    answered.delete_feedback(kept)
    assert answered.get_snapshot("snap_1") == snapshot
    answered.finish_job(job.id, "me", "failed")
    assert answered.thumb_counts() == {"total": 2, "unused": 2}


def test_forgetting_an_annotator_forgets_their_thumbs(answered: Store) -> None:
    answered.add_feedback("c1", 0, thumb="up", annotator="u-1")
    answered.add_feedback("c1", 0, thumb="down", annotator="u-2")
    answered.forget_end_user("u-1")
    assert [one.up for one in answered.training_thumbs()] == [False]
