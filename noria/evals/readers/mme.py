"""MME (Fu et al. 2023, https://arxiv.org/abs/2306.13394) as published: two yes/no questions a picture.

Comes in: the release's folder, one sub-folder a category, with `NAME.txt` beside `NAME.jpg|png` or in
`questions_answers_YN/` beside `images/` (lines `question TAB Yes|No`); or the hub's parquet files (`question_id`,
`image`, `question`, `answer`, `category`). Goes out: questions in groups of one picture, for accuracy+.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from noria.evals.questions import Picture, Question
from noria.evals.readers.rows import Read, Row, RowError, read_rows, text_of
from noria.records import BadRow

TEXTS = "questions_answers_YN"
SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
NOT_QUESTIONS = frozenset({"readme.txt", "license.txt"})


def looks_like_mme(folder: Path) -> bool:
    """Whether the folder is laid out as MME's release."""
    return next(_files(folder), None) is not None


def read_mme(path: Path) -> Read:
    """The questions of the folder or of the parquet file; a line is that of the text file."""
    if path.is_file():
        return read_rows(path, _from_row)
    questions: list[Question] = []
    bad: list[BadRow] = []
    for category, file in _files(path):
        for line, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not text.strip():
                continue
            try:
                questions.append(_from_line(text, category, file, line))
            except RowError as error:
                bad.append(BadRow(str(file), line, str(error)))
    return questions, bad


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each text file with its category, in order."""
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        texts = category / TEXTS
        for file in sorted((texts if texts.is_dir() else category).glob("*.txt")):
            if file.name.lower() not in NOT_QUESTIONS:
                yield category.name, file


def _from_line(text: str, category: str, file: Path, line: int) -> Question:
    question, tab, answer = text.strip().rpartition("\t")
    if not tab:
        raise RowError("no TAB between question and answer")
    folder = file.parent.parent / "images" if file.parent.name == TEXTS else file.parent
    found = next((path for path in (folder / f"{file.stem}{suffix}" for suffix in SUFFIXES) if path.is_file()), None)
    if found is None:
        raise RowError(f"picture {file.stem}.jpg or .png is not in {folder}")
    picture = Picture(found.name, found.read_bytes)
    return _question(question, answer, category, f"{category}/{file.stem}", picture, file, line)


def _from_row(row: Row, path: Path, line: int) -> Question:
    picture = row.get("image")
    if not isinstance(picture, Picture):
        raise RowError("no 'image'")
    group = text_of(row, "question_id")
    return _question(
        text_of(row, "question"), text_of(row, "answer"), text_of(row, "category"), group, picture, path, line
    )


def _question(text: str, answer: str, category: str, group: str, picture: Picture, path: Path, line: int) -> Question:
    said = answer.strip().lower().rstrip(".")
    if said not in ("yes", "no"):
        raise RowError(f"answer {answer.strip()!r} is neither Yes nor No")
    if not text.strip():
        raise RowError("the question is empty")
    return Question(
        id=f"{group}#{line}",
        prompt=text.strip(),
        answers=(said,),
        metric="yes_no",
        pictures=(picture,),
        category=category,
        group=f"{category}/{group}",
        file=str(path),
        line=line,
    )
