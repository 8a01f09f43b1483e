"""Totals by weight, failures counted by reward and reason, and the bound that stops a job."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from noria.errors import LeaseLost, SettingsError, TrainingError
from noria.rewards import RewardSettings, parse_rewards
from train.rewards import Backing, Failure, Sample, Value, Weighted, combine, scorer_of


class Says:
    """A reward that answers with what a function makes of each text; it keeps the sizes of its batches."""

    def __init__(self, name: str, of: Callable[[str], Any]) -> None:
        self.name = name
        self.closed = 0
        self.batches: list[int] = []
        self._of = of

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        self.batches.append(len(samples))
        return [self._of(sample.text) for sample in samples]

    def close(self) -> None:
        self.closed += 1


def samples(*texts: str) -> list[Sample]:
    return [Sample([], text) for text in texts]


def raises_on(word: str, error: Exception) -> Callable[[str], float]:
    def of(text: str) -> float:
        if text == word:
            raise error
        return float(len(text))

    return of


def test_totals_are_weighted_sums() -> None:
    scorer = combine([Weighted(Says("long", len), 2.0), Weighted(Says("has", lambda t: "a" in t), -0.5, "a")])
    scores = scorer(samples("abc", "", "xy"))
    assert scores.totals == [5.5, 0.0, 4.0]
    assert scores.parts == {"long": [3.0, 0.0, 2.0], "a": [1.0, 0.0, 0.0]}
    assert scores.failed == [{}, {}, {}]
    assert scorer.counts["long"] == {"samples": 3, "mean": 5 / 3, "failed": 0, "reasons": {}}
    assert scorer([]).totals == []


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "unjudged"),
        (Failure("timeout"), "timeout"),
        ("1.0", "returned str"),
        (math.nan, "not finite"),
        (-math.inf, "not finite"),
        (10**400, "not finite"),
    ],
)
def test_a_value_that_is_none_costs_its_sample_and_is_counted(said: Any, reason: str) -> None:
    scorer = combine([Says("odd", lambda text: said if text == "b" else 1.0), Says("fine", len)])
    scores = scorer(samples("a", "b", "c"))
    assert scores.totals == [2.0, None, 2.0]
    assert scores.parts == {"odd": [1.0, None, 1.0], "fine": [1.0, 1.0, 1.0]}
    assert scores.failed == [{}, {"odd": reason}, {}]
    assert scorer.counts["odd"] == {"samples": 3, "mean": 1.0, "failed": 1, "reasons": {reason: 1}}


def test_what_raises_costs_only_the_sample_it_raised_on() -> None:
    odd = Says("odd", raises_on("bb", ValueError("the text bb")))
    scorer = combine([odd])
    scores = scorer(samples("a", "bb", "ccc"))
    assert scores.totals == [1.0, None, 3.0]
    assert scores.failed[1] == {"odd": "raised ValueError"}
    assert odd.batches == [3, 1, 1, 1]


def test_an_error_on_purpose_goes_through() -> None:
    with pytest.raises(LeaseLost):
        combine([Says("odd", raises_on("b", LeaseLost("gone")))])(samples("a", "b"))


def test_a_wrong_number_of_values_is_no_value() -> None:
    class Short(Says):
        def __call__(self, samples: Sequence[Sample]) -> list[Value]:
            return super().__call__(samples)[1:]

    assert combine([Short("short", len)])(samples("a", "b")).failed == [{"short": "wrong number of values"}] * 2


def test_a_reward_without_weight_is_shown_and_costs_nothing() -> None:
    scorer = combine([Weighted(Says("shown", lambda t: None if t == "b" else 7.0), 0.0), Says("fine", len)])
    scores = scorer(samples("a", "b"))
    assert scores.totals == [1.0, 1.0]
    assert scores.parts["shown"] == [7.0, None]
    assert scorer.counts["shown"]["failed"] == 1


def test_the_rate_of_failures_stops_the_job_within_the_window() -> None:
    scorer = combine([Says("odd", lambda t: None if t == "b" else 1.0)], max_failure_rate=0.2, window=10)
    assert scorer(samples("b", "b")).totals == [None, None]  # two of ten: the bound, and not past it
    scorer(samples(*"a" * 10))
    scorer(samples("b", "b"))  # the first two have left the window
    with pytest.raises(TrainingError, match=r"'odd' could not judge 3 of the last 10 samples.*5 unjudged") as stopped:
        scorer(samples("b"))
    assert (stopped.value.code, stopped.value.param) == ("reward_failed", "max_failure_rate")


def test_a_reward_that_never_works_is_found_out_in_mid_batch() -> None:
    never = Says("never", lambda text: None)
    after = Says("after", len)
    with pytest.raises(TrainingError, match="could not judge"):
        combine([never, after])(samples(*"a" * 500))
    assert never.batches == [32]
    assert after.batches == []


def test_rewards_are_bounded_one_by_one() -> None:
    halves = [Says("one", lambda t: None if t == "a" else 1.0), Says("two", lambda t: None if t == "b" else 1.0)]
    scorer = combine(halves, max_failure_rate=0.5, window=4)
    assert scorer(samples("a", "b", "a", "b")).totals == [None] * 4
    assert [scorer.counts[key]["failed"] for key in ("one", "two")] == [2, 2]


def test_a_job_is_asked_between_batches_whether_it_may_go_on() -> None:
    asked: list[int] = []
    combine([Says("one", len)], check=lambda: asked.append(1))(samples(*"a" * 65))
    assert len(asked) == 3


def test_names_must_differ_and_be_there() -> None:
    with pytest.raises(SettingsError):
        combine([Says("one", len), Says("one", len)])
    with pytest.raises(SettingsError):
        combine([])


def test_what_rewards_hold_is_given_back() -> None:
    first, second = Says("one", len), Says("two", len)
    with combine([first, second]) as scorer:
        scorer(samples("a"))
    assert (first.closed, second.closed) == (1, 1)


def test_settings_make_a_scorer() -> None:
    rewards = parse_rewards([{"name": "exact", "weight": 2}, {"name": "length", "high": 3, "label": "short"}])
    settings = RewardSettings(rewards=rewards, max_failure_rate=0.0)
    with scorer_of(settings) as scorer:
        scores = scorer([Sample([], "red", answers=("Red",), tokens=4)])
        assert scores.totals == [2.0]
        assert scores.parts == {"exact": [1.0], "short": [0.0]}
        with pytest.raises(TrainingError, match="no right answer"):
            scorer([Sample([], "red", tokens=1)])


def test_when_one_reward_cannot_be_built_the_others_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.rewards import registry

    built = Says("exact", len)
    monkeypatch.setitem(registry.BUILDERS, "exact", lambda options, backing: built)
    rewards = parse_rewards([{"name": "exact"}, {"name": "preferences"}])
    with pytest.raises(TrainingError, match="reward preferences has no"):
        scorer_of(RewardSettings(rewards=rewards), Backing())
    assert built.closed == 1
