"""TextVQA (Singh et al. 2019, https://arxiv.org/abs/1904.08920) as published: VQA accuracy over ten people's answers.

Comes in: `TextVQA_0.5.1_val.json` (`{"data": [{"question", "question_id", "image_id", "answers": [ten]}]}`) with its
pictures beside it as `IMAGE_ID.jpg`, in the same folder or in `train_images/`, `test_images/`, `images/`; or the hub's
parquet files with the same columns and the pictures inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from noria.errors import InvalidRequest
from noria.evals.questions import Picture, Question
from noria.evals.readers.rows import Read, Row, RowError, read_rows, text_of, texts_of
from noria.records import BadRow

PEOPLE = 10
BRIEFLY = "Answer the question using a single word or phrase."
FOLDERS = ("train_images", "test_images", "images", "train_val_images/train_images", "")


def read_textvqa(path: Path) -> Read:
    """The file's questions. A row's line is its number in `data`, from 1. Raises InvalidRequest for another format."""
    if path.suffix == ".parquet":
        return read_rows(path, _question)
    try:
        data: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", param="set") from error
    rows = data.get("data") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise InvalidRequest(f"{path} has no list under 'data', as TextVQA's files have", param="set")
    questions: list[Question] = []
    bad: list[BadRow] = []
    for line, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise RowError("not a JSON object")
            questions.append(_question(row, path, line))
        except RowError as error:
            bad.append(BadRow(str(path), line, str(error)))
    return questions, bad


def _question(row: Row, path: Path, line: int) -> Question:
    if "answers" not in row:
        raise RowError("no 'answers': the test split is published without them")
    answers = texts_of(row["answers"], "answers")
    if len(answers) != PEOPLE:
        raise RowError(f"{len(answers)} answers; VQA accuracy is defined over {PEOPLE}")
    picture = row.get("image")
    return Question(
        id=str(row.get("question_id") or line),
        prompt=f"{text_of(row, 'question')}\n{BRIEFLY}",
        answers=answers,
        metric="vqa",
        pictures=(picture if isinstance(picture, Picture) else _beside(text_of(row, "image_id"), path.parent),),
        file=str(path),
        line=line,
    )


def _beside(image_id: str, folder: Path) -> Picture:
    name = Path(image_id).name
    names = [name] if Path(name).suffix else [f"{name}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
    for place in FOLDERS:
        for one in names:
            if (folder / place / one).is_file():
                return Picture(one, (folder / place / one).read_bytes)
    raise RowError(f"picture {names[0]} is in none of {', '.join(place or '.' for place in FOLDERS)} beside the file")
