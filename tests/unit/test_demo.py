"""The demo's questions, its annotator and how its win rate is counted."""

from __future__ import annotations

import pytest

from noria.demo.questions import PICTURES, held_out, training
from noria.demo.rule import Judgement, is_right, judge, win_rate
from noria.evals.questions import Question, content_of
from noria.scenes.drawn.scene import read_scene

RED = Question("1", "What colour is it?", ("red",), "contains")
A_PICTURE = Question("2", "What colour is it?", ("A",), "choice", options=("red", "blue"))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("It is red.", "It is blue.", "first"),
        ("It is blue.", "RED, of course, and nothing but red.", "second"),
        ("red " + "x" * 86, "red " + "x" * 96, "first"),  # 90 of 100
        ("red " + "x" * 96, "red " + "x" * 86, "second"),
        ("red " + "x" * 87, "red " + "x" * 96, "tie"),  # 91 of 100
        ("It is coloured.", "It is Red.", "second"),
        ("red  \n", "red", "tie"),
        ("blue", "a long answer that says nothing", "both_bad"),
    ],
)
def test_the_clearly_shorter_of_two_right_answers_wins(first: str, second: str, verdict: Judgement) -> None:
    assert judge(RED, first, second) == verdict


def test_an_answer_that_names_every_colour_is_not_right_about_a_picture() -> None:
    assert is_right(A_PICTURE, "A red circle.")
    assert not is_right(A_PICTURE, "Red or blue.")
    assert judge(A_PICTURE, "It is red or blue.", "It is a red circle, and rather a large one.") == "second"


def test_ties_and_both_bad_count_half() -> None:
    seen: list[Judgement] = ["first", "first", "first", "first", "first", "second", "second", "tie", "tie", "both_bad"]
    rate = win_rate(seen)
    assert (rate.n, rate.wins, rate.losses, rate.rate) == (10, 5, 2, 0.65)
    assert (rate.low, rate.high) == pytest.approx((0.354, 0.863), abs=1e-3)  # by hand from the formula
    with pytest.raises(ValueError, match="no comparison"):
        win_rate([])


def test_held_out_questions_are_no_training_questions() -> None:
    assert not {one.prompt for one in people(training())} & {one.prompt for one in people(held_out())}
    assert not {one.pictures[0].ref for one in pictures(training())} & {
        one.pictures[0].ref for one in pictures(held_out())
    }
    assert all(one.answers[0] in one.prompt for one in people((*training(), *held_out())))
    for asked in (training(), held_out()):
        assert min(len(people(asked)), len(pictures(asked))) > len(asked) / 3
        assert min(len(pictures(asked[:20])), len(people(asked[:20]))) > 5, "both kinds are spread over the whole"


def test_what_is_right_about_a_picture_is_what_the_picture_shows() -> None:
    for one in pictures(held_out()):
        things = read_scene(one.pictures[0].ref).things
        if one.category == "colour":
            assert is_right(one, f"The thing is {things[0].colour}.")
        if one.category == "count" and one.prompt.startswith(("How many shapes", "How many things")):
            assert is_right(one, f"There are {len(things)}.")
    content = content_of(pictures(held_out())[0])
    assert content[0]["image_url"]["url"].startswith("data:image/")  # type: ignore[index]


def people(questions: tuple[Question, ...]) -> list[Question]:
    return [one for one in questions if one.file != PICTURES]


def pictures(questions: tuple[Question, ...]) -> list[Question]:
    return [one for one in questions if one.file == PICTURES]
