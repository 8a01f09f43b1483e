"""Our own format: one question a line.

`{"question": "..", "image": ref or "images": [refs], "answer": ".." or "answers": [..], "options": [..],
"metric": "exact|contains|choice|number|anls|vqa|yes_no", "category": "..", "group": "..", "tolerance": 0.01,
"id": ".."}`; only the question and its answer must be there. Where `options` are, the metric is choice, and an answer
is a letter, the option's number from 0, or its text. The same keys as columns of a parquet file are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from noria.evals.normalise import normalised, number_in
from noria.evals.questions import LETTERS, METRICS, Metric, Picture, Question
from noria.evals.readers.pictures import picture_at
from noria.evals.readers.rows import Read, Row, RowError, read_rows, text_of, texts_of

KEYS = frozenset(
    {"question", "image", "images", "answer", "answers", "options", "metric", "category", "group", "tolerance", "id"}
)
CHOOSE = "Answer with the option's letter from the given choices directly."


def read_jsonl(path: Path, metric: Metric = "exact") -> Read:
    """The file's questions; `metric` is that of rows without one of their own and without options."""
    return read_rows(path, lambda row, where, line: _question(row, where, line, metric))


def _question(row: Row, path: Path, line: int, default: Metric) -> Question:
    unknown = sorted(set(row) - KEYS)
    if unknown:
        raise RowError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(KEYS))}")
    options = texts_of(row["options"], "options") if row.get("options") is not None else ()
    metric = row.get("metric") or ("choice" if options else default)
    if metric not in METRICS:
        raise RowError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    if (metric == "choice") != bool(options):
        raise RowError("the metric choice and 'options' go together")
    question = text_of(row, "question")
    return Question(
        id=str(row.get("id") or line),
        prompt=with_options(question, options) if options else question,
        answers=_answers(row, metric, options),
        metric=cast(Metric, metric),
        pictures=_pictures(row, path.parent),
        options=options,
        category=str(row.get("category") or ""),
        group=None if row.get("group") is None else str(row["group"]),
        tolerance=_tolerance(row),
        file=str(path),
        line=line,
    )


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its lettered options and the word to answer by letter, as MMMU and LLaVA ask it."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "", CHOOSE])


def letter_for(answer: Any, options: Sequence[str]) -> str:
    """The letter that an answer means: a letter, a number from 0, or an option's text. Raises RowError."""
    letters = LETTERS[: len(options)]
    said = str(answer).strip()
    same = [letter for letter, option in zip(letters, options, strict=True) if normalised(option) == normalised(said)]
    if not isinstance(answer, int) and said.strip("().").upper() in letters and len(said.strip("().")) == 1:
        return said.strip("().").upper()
    if len(same) == 1:
        return same[0]
    if said.isdecimal() and int(said) < len(letters):
        return letters[int(said)]
    raise RowError(f"answer {said!r} is none of the {len(options)} options")


def _answers(row: Row, metric: str, options: tuple[str, ...]) -> tuple[str, ...]:
    if ("answer" in row) == ("answers" in row):
        raise RowError("one of 'answer' and 'answers' is needed")
    value = row["answer"] if "answer" in row else row["answers"]
    found = texts_of(value, "answers")
    if options:
        listed = value if isinstance(value, list | tuple) else [value]
        return tuple(letter_for(one, options) for one in listed)
    if metric == "number" and any(number_in(one) is None for one in found):
        raise RowError(f"answer {found[0]!r} holds no number, and the metric is number")
    if metric == "yes_no":
        found = tuple(one.lower() for one in found)
        if not set(found) <= {"yes", "no"}:
            raise RowError(f"answer {found[0]!r} is neither yes nor no, and the metric is yes_no")
    if not all(found):
        raise RowError("an answer is empty")
    return found


def _pictures(row: Row, folder: Path) -> tuple[Picture, ...]:
    if row.get("image") is not None and row.get("images") is not None:
        raise RowError("'image' and 'images' are both there; one is enough")
    value = row.get("image") if row.get("image") is not None else row.get("images")
    refs = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(ref, Picture) or (isinstance(ref, str) and ref) for ref in refs):
        raise RowError("'image' must be a path or a URL, 'images' a list of them")
    return tuple(ref if isinstance(ref, Picture) else picture_at(ref, folder) for ref in refs)


def _tolerance(row: Row) -> float:
    value = row.get("tolerance") or 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise RowError("'tolerance' must be a number of at least 0")
    return float(value)
