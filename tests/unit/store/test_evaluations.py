"""Evaluations: kept whole, listed by version and set, gone with their answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from noria.errors import NotFound
from noria.records import Evaluation, EvaluationAnswer, Version
from noria.store import Store


def evaluation(id_: str, version: str = "v1", set_name: str = "embedded") -> Evaluation:
    """An evaluation with something in every field."""
    return Evaluation(
        id=id_,
        version=version,
        set_name=set_name,
        set_hash="sha256:ab",
        created_at=5.0,
        sampling={"temperature": 0.0, "max_tokens": 64},
        scores={"score": 0.5, "low": 0.1, "high": 0.9, "n": 2, "categories": {}},
        counts={"questions": 2, "failed": 1},
        run={"through": "aside", "seconds": 1.5},
    )


def answer(position: int) -> EvaluationAnswer:
    """An answer with something in every field; characters that a database may refuse in the text."""
    return EvaluationAnswer(
        position=position,
        question_id=f"colour-{position}",
        category="colour",
        question="Which colour?",
        pictures=("ab" * 32,),
        expected=("red", "crimson"),
        metric="exact",
        answer="r\u00e9d \U0001f534",
        score=0.3,
        finish_reason="length",
        error=None,
    )


@pytest.fixture
def versions(store: Store) -> Store:
    """The store with v1 and v2 in it."""
    for id_ in ("v1", "v2"):
        store.add_version(Version(id=id_, parent=None, state="candidate", method="base", job=None, created_at=1.0))
    return store


def test_an_evaluation_comes_back_as_it_was(versions: Store) -> None:
    answers = [answer(position) for position in range(1201)]  # more than one batch
    versions.add_evaluation(evaluation("eval_1"), answers)
    assert versions.get_evaluation("eval_1") == evaluation("eval_1")
    assert versions.evaluation_answers("eval_1") == answers
    assert versions.evaluation_answers("eval_2") == []


def test_the_list_is_newest_first_and_by_version_and_set(versions: Store) -> None:
    for id_, version, set_name in (("a", "v1", "x"), ("b", "v2", "x"), ("c", "v1", "y"), ("d", "v1", "x")):
        versions.add_evaluation(evaluation(id_, version, set_name), [answer(0)])
    assert [one.id for one in versions.list_evaluations()] == ["d", "c", "b", "a"]
    assert [one.id for one in versions.list_evaluations(version="v1", set_name="x")] == ["d", "a"]
    assert [one.id for one in versions.list_evaluations(limit=2)] == ["d", "c"]


def test_what_does_not_fit_leaves_nothing_behind(versions: Store) -> None:
    with pytest.raises(NotFound, match="no version 'v9'"):
        versions.add_evaluation(evaluation("eval_1", "v9"), [answer(0)])
    with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
        versions.add_evaluation(evaluation("eval_1"), [answer(0), replace(answer(0), answer="twice")])
    assert versions.list_evaluations() == []
    with pytest.raises(NotFound, match="eval_1"):
        versions.get_evaluation("eval_1")


def test_answers_go_with_their_evaluation(versions: Store) -> None:
    versions.add_evaluation(evaluation("eval_1"), [answer(0)])
    versions.delete_evaluation("eval_1")
    assert versions.evaluation_answers("eval_1") == []
    with pytest.raises(NotFound):
        versions.delete_evaluation("eval_1")
