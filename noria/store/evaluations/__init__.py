"""What versions scored on sets of questions.

Comes in: an evaluation with every answer. Goes out: the same. Answers are rows and no file: they are written in one
transaction with their scores, reach every machine that shares a PostgreSQL store, and go when their evaluation goes.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, insert, select

from noria.errors import NotFound
from noria.records import Evaluation, EvaluationAnswer
from noria.store.completions import Part
from noria.store.tables import evaluation_answers, evaluations, versions

BATCH = 500


class EvaluationStore(Part):
    """The store's evaluations. None is ever overwritten: a version that is asked again has two."""

    def add_evaluation(self, evaluation: Evaluation, answers: Sequence[EvaluationAnswer]) -> None:
        """Adds an evaluation with its answers. Raises NotFound for a version that the store does not know."""
        rows = [{"evaluation_id": evaluation.id, **vars(answer)} for answer in answers]
        with self._db.write() as conn:
            if conn.execute(select(versions.c.id).where(versions.c.id == evaluation.version)).first() is None:
                raise NotFound(f"no version {evaluation.version!r}", param="version")
            conn.execute(insert(evaluations), vars(evaluation))
            for start in range(0, len(rows), BATCH):
                conn.execute(insert(evaluation_answers), rows[start : start + BATCH])

    def get_evaluation(self, id_: str) -> Evaluation:
        """One evaluation. Raises NotFound."""
        with self._db.read() as conn:
            row = conn.execute(select(evaluations).where(evaluations.c.id == id_)).first()
        if row is None:
            raise NotFound(f"no evaluation {id_!r}; `noria eval --list` lists them", param="evaluation")
        return _evaluation(row)

    def list_evaluations(
        self, *, version: str | None = None, set_name: str | None = None, limit: int | None = None
    ) -> list[Evaluation]:
        """The newest first, of one version or set where named."""
        query = select(evaluations).order_by(evaluations.c.seq.desc()).limit(limit)
        if version is not None:
            query = query.where(evaluations.c.version == version)
        if set_name is not None:
            query = query.where(evaluations.c.set_name == set_name)
        with self._db.read() as conn:
            return [_evaluation(row) for row in conn.execute(query)]

    def evaluation_answers(self, id_: str) -> list[EvaluationAnswer]:
        """Every answer of an evaluation, in the set's order; none for an unknown one."""
        of = select(evaluation_answers).where(evaluation_answers.c.evaluation_id == id_)
        with self._db.read() as conn:
            return [_answer(row) for row in conn.execute(of.order_by(evaluation_answers.c.position))]

    def delete_evaluation(self, id_: str) -> None:
        """Removes an evaluation and its answers. Raises NotFound."""
        with self._db.write() as conn:
            if not conn.execute(delete(evaluations).where(evaluations.c.id == id_)).rowcount:
                raise NotFound(f"no evaluation {id_!r}", param="evaluation")


def _evaluation(row: Any) -> Evaluation:
    return Evaluation(**{key: value for key, value in row._mapping.items() if key != "seq"})


def _answer(row: Any) -> EvaluationAnswer:
    values = {key: value for key, value in row._mapping.items() if key != "evaluation_id"}
    return EvaluationAnswer(**{**values, "pictures": tuple(row.pictures), "expected": tuple(row.expected)})
