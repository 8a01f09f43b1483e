"""What keys have used: totals that several servers add to, and a window that no restart empties."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from noria.store import Store
from tests.unit.store.conftest import Clock

HOUR_S = 3600.0


def test_tokens_add_up(store: Store) -> None:
    """Over writes and keys; what is older than yesterday goes."""
    assert store.add_tokens({("a", 10): 5, ("b", 10): 7}) == {("a", 10): 5, ("b", 10): 7}
    assert store.add_tokens({("a", 10): 2**40}) == {("a", 10): 5 + 2**40}
    assert store.tokens_of(10) == {"a": 5 + 2**40, "b": 7}
    store.add_tokens({("b", 12): 1})
    assert store.tokens_of(10) == {} and store.tokens_of(12) == {"b": 1}


def test_a_day_is_kept_while_the_next_begins(store: Store) -> None:
    """Both days of one write are there."""
    store.add_tokens({("a", 10): 5, ("a", 11): 1})
    assert store.tokens_of(10) == {"a": 5} and store.tokens_of(11) == {"a": 1}


def test_judgements_are_counted_within_the_hour(store: Store, clock: Clock) -> None:
    """The one too many is told how long to wait, and that is true."""
    assert store.spend_judgement("a", 2, HOUR_S).id is not None
    clock.now += 600.25
    assert store.spend_judgement("a", 2, HOUR_S).id is not None
    refused = store.spend_judgement("a", 2, HOUR_S)
    assert refused.id is None and refused.wait_s == pytest.approx(HOUR_S - 600.25)
    assert store.spend_judgement("b", 2, HOUR_S).id is not None
    clock.now += refused.wait_s
    assert store.judgements_spent("a", HOUR_S) == 1
    assert store.spend_judgement("a", 2, HOUR_S).id is not None
    assert store.spend_judgement("a", 2, HOUR_S).wait_s == pytest.approx(600.25)


def test_a_lower_limit_waits_for_as_many_as_are_too_many(store: Store, clock: Clock) -> None:
    """Settings change between two starts."""
    for _ in range(3):
        store.spend_judgement("a", 3, HOUR_S)
        clock.now += 100.0
    assert store.spend_judgement("a", 1, HOUR_S).wait_s == pytest.approx(HOUR_S - 100.0)


def test_what_came_to_nothing_is_given_back(store: Store) -> None:
    """It does not count."""
    spent = store.spend_judgement("a", 1, HOUR_S)
    assert spent.id is not None and store.spend_judgement("a", 1, HOUR_S).id is None
    store.give_judgement_back(spent.id)
    assert store.judgements_spent("a", HOUR_S) == 0
    assert store.spend_judgement("a", 1, HOUR_S).id is not None


def test_no_race_gets_past_the_limit(store: Store) -> None:
    """Sixteen threads, five places."""
    with ThreadPoolExecutor(16) as threads:
        spent = list(threads.map(lambda _: store.spend_judgement("a", 5, HOUR_S), range(16)))
    assert sum(one.id is not None for one in spent) == 5 == store.judgements_spent("a", HOUR_S)
