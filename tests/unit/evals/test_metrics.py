"""Every metric against values worked out by hand."""

from __future__ import annotations

import pytest

from noria.evals.metrics import anls, edit_distance, score, vqa_accuracy
from noria.evals.normalise import letter_of, normalised, number_in, vqa_words, words_of, yes_or_no
from noria.evals.questions import Metric, Question


def question(metric: Metric, *answers: str, options: tuple[str, ...] = (), tolerance: float = 0.0) -> Question:
    """A question that only its scoring reads."""
    return Question("q", "?", answers, metric, options=options, tolerance=tolerance)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Eiffel-Tower!", ["eiffel", "tower"]),
        ("It costs $1,234.50.", ["it", "costs", "1234.50"]),
        ("-3 degrees", ["-3", "degrees"]),
        ("don't", ["dont"]),
        ("DON\u2019T stop", ["dont", "stop"]),
        ("a", ["a"]),
        ("An apple a day", ["apple", "day"]),
        ("\uff21\uff22 caf\u00e9", ["ab", "caf\u00e9"]),
        ("first, second", ["first", "second"]),
        ("...", []),
    ],
)
def test_words_in_one_spelling(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_exact_forgives_case_punctuation_and_articles_and_nothing_else() -> None:
    wanted = question("exact", "the red Circle", "disc")
    assert [score(wanted, said) for said in ("Red circle.", "a disc", "red circle there", "")] == [1, 1, 0, 0]
    assert normalised("1,000") == normalised("1000") != normalised("1.000")


def test_contains_asks_for_whole_words_in_order() -> None:
    wanted = question("contains", "carbon dioxide")
    said = ("It is Carbon dioxide.", "dioxide carbon", "carbon monoxide", "hydrocarbon dioxides")
    assert [score(wanted, one) for one in said] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("There are 3 shapes.", 3.0),
        ("2 + 1 = 3", 3.0),
        ("about 1,234.5 m", 1234.5),
        ("minus: -7", -7.0),
        ("5-3", 3.0),
        ("twelve", 12.0),
        ("Three. The red one is 4 cm", 4.0),
        ("v2 is none of it", None),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("none", None),
        ("10%", 10.0),
    ],
)
def test_the_last_number_is_the_answer(said: str, number: float | None) -> None:
    assert number_in(said) == number


def test_numbers_compare_within_their_tolerance() -> None:
    assert score(question("number", "3"), "three shapes") == 1.0
    assert score(question("number", "3"), "four") == 0.0
    assert score(question("number", "3.429", tolerance=0.005), "3.43") == 1.0
    assert score(question("number", "3.429"), "3.43") == 0.0
    assert score(question("number", "3"), "I do not know") == 0.0


OPTIONS = ("a circle", "a square", "both of them")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(C)", "C"),
        ("The answer is B because A is round", "B"),
        ("Answer: C", "C"),
        ("It cannot be (A), so it is (B).", "B"),
        ("A. It is round", "A"),
        ("I choose B", "B"),
        ("a square", "B"),
        ("It shows both of them", "C"),
        ("A square is shown", "B"),
        ("a circle or a square", None),
        ("D", None),
        ("the answer is a circle", "A"),
        ("", None),
    ],
)
def test_an_option_is_read_and_never_guessed(said: str, letter: str | None) -> None:
    assert letter_of(said, OPTIONS) == letter


def test_a_choice_is_right_by_its_letter() -> None:
    wanted = question("choice", "B", options=OPTIONS)
    assert [score(wanted, one) for one in ("B", "(A)", "who knows")] == [1, 0, 0]


def test_edit_distance_by_hand() -> None:
    assert [edit_distance("kitten", "sitting"), edit_distance("", "abc"), edit_distance("abc", "abc")] == [3, 3, 0]


def test_anls_is_the_similarity_to_the_nearest_answer_and_zero_from_the_threshold_on() -> None:
    assert anls("Stop", ["STOP"]) == 1.0
    assert anls("hallo", ["hello", "goodbye"]) == pytest.approx(0.8)  # one of five letters: NL 0.2
    assert anls("ab", ["ax"]) == 0.0  # NL is the threshold itself, 0.5
    assert anls("abc", ["abx"]) == pytest.approx(2 / 3)
    assert anls("", ["word"]) == 0.0
    assert score(question("anls", "route 66"), "Route  66") == 1.0


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_person_out_in_turn(same: int, accuracy: float) -> None:
    people = ["red"] * same + [f"other {number}" for number in range(10 - same)]
    assert vqa_accuracy("Red.", people) == pytest.approx(accuracy)
    by_hand = [min(sum(one == "red" for one in people[:i] + people[i + 1 :]) / 3, 1) for i in range(10)]
    assert vqa_accuracy("red", people) == pytest.approx(sum(by_hand) / 10)


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("t-shirt", "t shirt"),
        ("what's up?", "what s up"),
        ("dont", "dont"),
        ("Don\u2019t", "dont"),
        ("a-b c - d", "ab c d"),  # one mark beside a space, and every such mark goes
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("coca cola.", "coca cola"),
    ],
)
def test_vqa_spelling(said: str, compared: str) -> None:
    assert vqa_words(said) == compared


def test_yes_and_no_are_looked_for_in_the_first_four_characters() -> None:
    said = ("Yes.", "no", "No, it is", "The yes", "", " YES")
    assert [yes_or_no(one) for one in said] == ["yes", "no", "no", None, None, "yes"]
    assert score(question("yes_no", "yes"), "Yes, there is") == 1.0
    assert score(question("yes_no", "yes"), "Sure") == 0.0
