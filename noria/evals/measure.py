"""One set asked of one version: replies scored, and put into the records that the store keeps.

Comes in: a set, a target, how to sample. Goes out: an `Evaluation` with one `EvaluationAnswer` a question.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence

from noria.errors import InvalidRequest
from noria.evals.ask import Reply, Target, ask_all
from noria.evals.metrics import score
from noria.evals.questions import LETTERS, Question, QuestionSet
from noria.evals.scores import summarise
from noria.records import Evaluation, EvaluationAnswer, Json

CONCURRENCY = 8
MAX_TOKENS = 64


def sampling_of(max_tokens: int = MAX_TOKENS) -> Json:
    """How answers are drawn: greedily, at most `max_tokens` long. Two results compare when this is the same."""
    return {"temperature": 0.0, "max_tokens": max_tokens, "seed": 0}


def measure(
    asked: QuestionSet,
    target: Target,
    sampling: Json,
    *,
    concurrency: int = CONCURRENCY,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, list[EvaluationAnswer]]:
    """Asks and scores. A question that the server refuses counts as wrong, and among `counts.failed`.

    Raises Conflict when the version changes meanwhile, Unavailable when nobody answers, InvalidRequest when the server
    refuses every question.
    """
    began = time.monotonic()
    replies = ask_all(target, asked.questions, sampling, concurrency=concurrency, tick=tick)
    seconds = time.monotonic() - began
    refused = [reply.error for reply in replies if reply.error is not None]
    if len(refused) == len(replies):
        raise InvalidRequest(f"the server refused every question of {asked.name}; the first: {refused[0]}", param="set")
    answers = _scored(asked, replies)
    cut = Counter(reply.finish_reason for reply in replies)["length"]
    evaluation = Evaluation(
        id=f"eval_{uuid.uuid4().hex[:24]}",
        version=target.version,
        set_name=asked.name,
        set_hash=asked.hash,
        created_at=time.time(),
        sampling=dict(sampling),
        scores=summarise(asked.questions, [answer.score for answer in answers]),
        counts={"questions": len(answers), "failed": len(refused), "cut": cut, "bad_rows": len(asked.bad)},
        run={
            "through": target.through,
            "seconds": seconds,
            "concurrency": concurrency,
            "tokens": sum(reply.tokens or 0 for reply in replies),
            "fingerprint": next((reply.fingerprint for reply in replies if reply.fingerprint), None),
        },
    )
    return evaluation, answers


def _expected(question: Question) -> tuple[str, ...]:
    """The right answers for a reader: a letter alone says little."""
    if not question.options:
        return question.answers
    return tuple(f"{one} ({question.options[LETTERS.index(one)]})" for one in question.answers)


def _scored(asked: QuestionSet, replies: Sequence[Reply]) -> list[EvaluationAnswer]:
    rows = zip(asked.questions, asked.pictures, replies, strict=True)
    return [
        EvaluationAnswer(
            position=position,
            question_id=question.id,
            category=question.category,
            question=question.prompt,
            pictures=pictures,
            expected=_expected(question),
            metric=question.metric,
            answer=reply.text,
            score=0.0 if reply.error else score(question, reply.text),
            finish_reason=reply.finish_reason,
            error=reply.error,
        )
        for position, (question, pictures, reply) in enumerate(rows)
    ]
