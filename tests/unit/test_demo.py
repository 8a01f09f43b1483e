"""The demo's annotator and how its win rate is counted."""

from __future__ import annotations

import pytest

from noria.demo.questions import HELD_OUT, TRAINING
from noria.demo.rule import Judgement, judge, win_rate


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("It is red.", "It is blue.", "first"),
        ("It is blue.", "RED, of course, and nothing but red.", "second"),
        ("red" + "x" * 87, "red" + "x" * 97, "first"),  # 90 of 100
        ("red" + "x" * 97, "red" + "x" * 87, "second"),
        ("red" + "x" * 88, "red" + "x" * 97, "tie"),  # 91 of 100
        ("red  \n", "red", "tie"),
        ("blue", "a long answer that says nothing", "both_bad"),
    ],
)
def test_the_clearly_shorter_of_two_right_answers_wins(first: str, second: str, verdict: Judgement) -> None:
    assert judge(first, second, "red") == verdict


def test_ties_and_both_bad_count_half() -> None:
    seen: list[Judgement] = ["first", "first", "first", "first", "first", "second", "second", "tie", "tie", "both_bad"]
    rate = win_rate(seen)
    assert (rate.n, rate.wins, rate.losses, rate.rate) == (10, 5, 2, 0.65)
    assert (rate.low, rate.high) == pytest.approx((0.354, 0.863), abs=1e-3)  # by hand from the formula
    with pytest.raises(ValueError, match="no comparison"):
        win_rate([])


def test_held_out_questions_are_no_training_questions() -> None:
    assert (len(TRAINING), len(HELD_OUT)) == (96, 64)
    assert not {one.prompt for one in TRAINING} & {one.prompt for one in HELD_OUT}
    assert all(one.fact in one.prompt for one in (*TRAINING, *HELD_OUT))
