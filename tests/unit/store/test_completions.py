"""Completions: exact round trips, pages, filters, deletion with everything that hangs on one."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import StatementError

from noria.errors import NotFound
from noria.records import Choice, Image, Side
from noria.store import Store
from tests.unit.store.samples import PICTURE, completion


def test_a_completion_comes_back_exactly(store: Store) -> None:
    given = completion(
        images=(PICTURE, Image("b" * 64, "image/jpeg", 9), PICTURE),
        end_user="u-1",
        metadata={"topic": "dogs"},
        system_fingerprint="v1-1a2b3c4d",
        ttft_s=0.25,
        duration_s=1.5,
        finished=False,
    )
    assert store.add_completions([given]) == 1
    assert store.get_completion("c1") == given


def test_text_that_utf8_or_a_database_refuses_does_not_lose_the_batch(store: Store) -> None:
    answer = Choice(0, "nul \0 and \ud800 and \U0001f600", {"role": "assistant", "content": "nul \0 \ud800"})
    assert store.add_completions([completion("bad", choices=(answer,)), completion("good")]) == 2
    kept = store.get_completion("bad").choices[0]
    assert kept.text == "nul \ufffd and \ufffd and \U0001f600"
    assert kept.message == answer.message


def test_what_a_refused_row_held_is_not_in_the_error(store: Store) -> None:
    """Errors go to the log, and no prompt and no user does."""
    refused = completion("c1", end_user=7, messages=({"role": "user", "content": "my secret"},))
    with pytest.raises(StatementError) as error:
        store.add_completions([refused])
    assert "INSERT INTO completions" in str(error.value) and "secret" not in str(error.value)


def test_an_id_that_is_stored_already_stays_as_it_is(store: Store) -> None:
    first = completion("c1", metadata={"a": "1"}, images=(PICTURE,))
    assert store.add_completions([first]) == 1
    assert store.add_completions([completion("c1", ("other",)), completion("c2")]) == 1
    assert store.get_completion("c1") == first
    assert store.count_completions() == 2
    assert store.add_completions([]) == 0


def test_an_unknown_completion_is_not_found(store: Store) -> None:
    for call in (store.get_completion, store.delete_completion):
        with pytest.raises(NotFound, match="'nope'"):
            call("nope")
    with pytest.raises(NotFound, match="'nope'"):
        store.set_completion_metadata("nope", {})
    with pytest.raises(NotFound, match="after='nope'"):
        store.list_completions(after="nope")


def test_pages_follow_time_and_then_id(store: Store) -> None:
    times = {"c3": 1.0, "c1": 2.0, "c2": 2.0, "c0": 3.0}
    store.add_completions([completion(id_, created_at=at) for id_, at in times.items()])

    def ids(**query: object) -> list[str]:
        return [one.id for one in store.list_completions(**query)]  # type: ignore[arg-type]

    assert ids() == ["c3", "c1", "c2", "c0"]
    assert ids(order="desc") == ["c0", "c2", "c1", "c3"]
    assert ids(after="c1", limit=1) == ["c2"]
    assert ids(after="c2", order="desc") == ["c1", "c3"]
    assert ids(after="c0") == []


def test_filters_must_all_match(store: Store) -> None:
    store.add_completions(
        [
            completion("c1", metadata={"topic": "dogs", "lang": "en"}, end_user="u-1"),
            completion("c2", metadata={"topic": "dogs", "lang": "de"}),
            completion("c3", model="other"),
        ]
    )
    assert [one.id for one in store.list_completions(metadata={"topic": "dogs"})] == ["c1", "c2"]
    assert [one.id for one in store.list_completions(metadata={"topic": "dogs", "lang": "de"})] == ["c2"]
    assert [one.id for one in store.list_completions(model="other")] == ["c3"]
    assert [one.id for one in store.list_completions(end_user="u-1")] == ["c1"]
    assert store.list_completions(metadata={"topic": "cats"}) == []


def test_new_metadata_replaces_the_old_in_value_and_filter(store: Store) -> None:
    store.add_completions([completion(metadata={"topic": "dogs"})])
    assert store.set_completion_metadata("c1", {"lang": "en"}).metadata == {"lang": "en"}
    assert store.list_completions(metadata={"topic": "dogs"}) == []
    assert [one.id for one in store.list_completions(metadata={"lang": "en"})] == ["c1"]


def test_deleting_takes_judgements_along_and_names_orphaned_images(store: Store) -> None:
    other = Image("b" * 64, "image/png", 1)
    store.add_completions([completion("c1", images=(PICTURE, other)), completion("c2", images=(PICTURE,))])
    store.add_preference(Side("c1", 0), Side("c2", 1))
    store.add_feedback("c1", 0, thumb="up")
    assert store.delete_completion("c1") == [other.sha256]
    assert store.list_preferences() == []
    assert store.list_feedback() == []
    assert store.delete_completion("c2") == [PICTURE.sha256]
    assert store.count_completions() == 0


def test_recent_completions_are_finished_answered_and_of_the_kind(store: Store) -> None:
    store.add_completions(
        [
            completion("text", created_at=1.0),
            completion("vision", created_at=2.0, images=(PICTURE,)),
            completion("empty", ("",), created_at=3.0),
            completion("cut", created_at=4.0, finished=False),
        ]
    )
    assert [one.id for one in store.recent_completions(9)] == ["vision", "text"]
    assert [one.id for one in store.recent_completions(9, "text")] == ["text"]
    assert [one.id for one in store.recent_completions(9, "vision")] == ["vision"]
    assert [one.id for one in store.recent_completions(1)] == ["vision"]


def test_a_page_longer_than_one_query_of_ids_is_complete(store: Store) -> None:
    store.add_completions([completion(f"c{i:04}", (f"answer {i}",), images=(PICTURE,)) for i in range(1203)])
    page = store.list_completions(limit=5000)
    assert [one.choices[0].text for one in page] == [f"answer {i}" for i in range(1203)]
    assert all(one.images == (PICTURE,) for one in page)
