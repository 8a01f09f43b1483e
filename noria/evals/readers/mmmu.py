"""MMMU (Yue et al. 2023, https://arxiv.org/abs/2311.16502) as published: options, and up to seven pictures a question.

Comes in: a parquet or JSONL file, or a folder of them, with `id`, `question`, `options` (a list, or a Python list as
text), `answer`, `question_type` (`multiple-choice` or `open`) and `image_1` .. `image_7` (bytes, or paths in JSONL);
texts say `<image 2>` where a picture stands. Goes out: choices by letter; open questions whose answer is a number by
that number to two decimals, the others by the words that the answer must hold. Nothing is drawn at random where an
answer cannot be read: it is wrong.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from noria.evals.normalise import number_in
from noria.evals.questions import MARK, Metric, Picture, Question
from noria.evals.readers.jsonl import letter_for, with_options
from noria.evals.readers.pictures import picture_at
from noria.evals.readers.rows import Read, Row, RowError, read_rows, text_of, texts_of
from noria.evals.readers.textvqa import BRIEFLY

PICTURES = 7
TWO_DECIMALS = 0.005
_SUBJECT = re.compile(r"(?:dev|validation|test)_(.+)_\d+")
_PLAIN_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+%?")


def read_mmmu(path: Path) -> Read:
    """The file's questions."""
    return read_rows(path, _question)


def _question(row: Row, path: Path, line: int) -> Question:
    text = text_of(row, "question")
    options = texts_of(found, "options") if (found := _listed(row.get("options"), "options")) else ()
    kind = row.get("question_type") or ("multiple-choice" if options else "open")
    if (kind == "multiple-choice") != bool(options):
        raise RowError(f"question_type is {kind!r} and there are {len(options)} options")
    metric, answers, tolerance = _answers(row, options)
    prompt = with_options(text, options) if options else f"{text}\n{BRIEFLY}"
    pictures = _pictures(row, path.parent)
    beyond = [number for number in MARK.findall(prompt) if int(number) > len(pictures)]
    if beyond:
        raise RowError(f"the text shows <image {beyond[0]}>, and there is no image_{beyond[0]}")
    id_ = str(row.get("id") or line)
    subject = _SUBJECT.fullmatch(id_)
    return Question(
        id=id_,
        prompt=prompt,
        answers=answers,
        metric=metric,
        pictures=pictures,
        options=options,
        category=subject[1] if subject else str(row.get("subfield") or ""),
        tolerance=tolerance,
        file=str(path),
        line=line,
    )


def _answers(row: Row, options: tuple[str, ...]) -> tuple[Metric, tuple[str, ...], float]:
    if options:
        answer = text_of(row, "answer")
        if answer == "?":
            raise RowError("the answer is '?': the test split is published without answers")
        return "choice", (letter_for(answer, options),), 0.0
    answers = texts_of(_listed(row.get("answer"), "answer"), "answer")
    if not all(answers):
        raise RowError("the answer is empty")
    if all(_PLAIN_NUMBER.fullmatch(one) and number_in(one) is not None for one in answers):
        return "number", answers, TWO_DECIMALS
    return "contains", answers, 0.0


def _listed(value: Any, key: str) -> Any:
    """The published files write lists as Python text: `"['A', 'B']"`."""
    if not (isinstance(value, str) and value.startswith("[")):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise RowError(f"{key!r} is no list: {error}") from error


def _pictures(row: Row, folder: Path) -> tuple[Picture, ...]:
    """image_1 up to the last one that is there; none may be missing between."""
    cells = [row.get(f"image_{number}") for number in range(1, PICTURES + 1)]
    while cells and cells[-1] in (None, ""):
        cells.pop()
    found = []
    for number, cell in enumerate(cells, 1):
        if isinstance(cell, Picture):
            found.append(cell)
        elif isinstance(cell, str) and cell:
            found.append(picture_at(cell, folder))
        else:
            raise RowError(f"image_{number} is missing, and image_{len(cells)} is there")
    return tuple(found)
