"""Means, intervals, MME's points and the paired comparison against values worked out by hand."""

from __future__ import annotations

import pytest

from noria.evals.questions import Question
from noria.evals.scores import paired, rate_of, summarise, wilson


def asked(category: str, group: str | None = None) -> Question:
    """A question that only counting reads."""
    return Question("q", "?", ("yes",), "yes_no", category=category, group=group)


def test_the_wilson_interval() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson 1927, by hand
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_a_rate_is_the_mean_of_fractions_too() -> None:
    assert rate_of([1.0, 0.3, 0.0, 0.9])["score"] == pytest.approx(0.55)
    assert rate_of([]) == {"score": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_categories_are_apart_and_without_a_name_there_are_none() -> None:
    found = summarise([asked("b"), asked("a"), asked("b")], [1.0, 0.0, 0.0])
    assert found["score"] == pytest.approx(1 / 3)
    assert {name: (one["score"], one["n"]) for name, one in found["categories"].items()} == {"a": (0, 1), "b": (0.5, 2)}
    assert "all_right" not in found
    assert summarise([asked("")], [1.0])["categories"] == {}


def test_mme_counts_pictures_whose_questions_are_all_right() -> None:
    questions = [asked("existence", "1"), asked("existence", "1"), asked("existence", "2"), asked("existence", "2")]
    questions += [asked("code_reasoning", "3"), asked("code_reasoning", "3")]
    found = summarise(questions, [1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert found["score"] == pytest.approx(5 / 6)
    assert found["all_right"]["score"] == pytest.approx(2 / 3)
    assert found["all_right"]["n"] == 3
    assert found["categories"]["existence"]["all_right"]["score"] == 0.5
    assert found["mme"]["perception"] == pytest.approx(100 * (0.75 + 0.5))
    assert found["mme"]["cognition"] == pytest.approx(200.0)


def test_groups_under_other_names_get_no_mme_points() -> None:
    assert "mme" not in summarise([asked("mine", "1")], [1.0])


def test_the_sign_test_is_exact() -> None:
    found = paired([1, 1, 1, 1, 1, 0, 0.5], [0, 0, 0, 0, 0, 1, 0.5])
    assert (found.better, found.worse, found.same) == (5, 1, 1)
    assert found.p == pytest.approx(2 * (1 + 6) / 64)  # at most one head in six, on either side
    assert paired([1.0], [1.0]).p == 1.0
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0], [])
