"""From what the operator named to a set of questions.

Comes in: the name of a set that Noria has, or a path, with the format in front where its look does not tell it:
`mmmu:questions.jsonl`. Goes out: a `QuestionSet`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from noria.errors import InvalidRequest, NotFound
from noria.evals.named.embedded import embedded_questions
from noria.evals.named.text import text_questions
from noria.evals.questions import Metric, Question, QuestionSet, make_set
from noria.evals.readers.jsonl import read_jsonl
from noria.evals.readers.mme import looks_like_mme, read_mme
from noria.evals.readers.mmmu import read_mmmu
from noria.evals.readers.rows import Read, columns_of
from noria.evals.readers.textvqa import read_textvqa
from noria.records import BadRow

NAMED: dict[str, Callable[[], Sequence[Question]]] = {"embedded": embedded_questions, "embedded-text": text_questions}
FORMATS = ("jsonl", "textvqa", "mme", "mmmu")
ROW_FILES = (".jsonl", ".parquet")


def load_set(named: str, *, metric: Metric = "exact", limit: int | None = None) -> QuestionSet:
    """The set of this name, or the one in this file or folder; `limit` takes so many, categories in turn.

    `metric` is that of JSONL rows that say none. Raises NotFound where there is neither, InvalidRequest for a file of
    another format or without a question that can be asked.
    """
    if named in NAMED:
        questions: list[Question] = list(NAMED[named]())
        bad: list[BadRow] = []
    else:
        path, format_ = _place(named)
        questions, bad = _read(path, format_, metric)
    return make_set(name_of(named), questions if limit is None else _some(questions, limit), bad)


def _some(questions: Sequence[Question], limit: int) -> list[Question]:
    """The first of every category, then the second of each, in the set's own order."""
    seen: Counter[str] = Counter()
    turns = []
    for place, one in enumerate(questions):
        turns.append((seen[one.category], place))
        seen[one.category] += 1
    return [questions[place] for place in sorted(place for _, place in sorted(turns)[:limit])]


def name_of(named: str) -> str:
    """The name under which results of a set are kept: its own, or that of its file or folder."""
    return named if named in NAMED else _split(named)[0].resolve().name


def _split(named: str) -> tuple[Path, str | None]:
    head, colon, rest = named.partition(":")
    said = head if colon and head in FORMATS else None
    return Path(rest if said else named).expanduser(), said


def _place(named: str) -> tuple[Path, str]:
    path, said = _split(named)
    if not path.exists():
        raise NotFound(
            f"no set and no file is called {named!r}; the sets are {', '.join(NAMED)}, a file may be named with its "
            f"format: {FORMATS[1]}:PATH (of {', '.join(FORMATS)})",
            param="set",
        )
    return path, said or _format_of(path)


def _format_of(path: Path) -> str:
    """The format by the file's look. Raises InvalidRequest when it looks like none."""
    if path.is_dir():
        files = _row_files(path)
        if not files and looks_like_mme(path):
            return "mme"
        if not files:
            raise InvalidRequest(f"{path} holds neither .jsonl nor .parquet files, nor MME's folders", param="set")
        path = files[0]
    if path.suffix == ".json":
        return "textvqa"
    if path.suffix not in ROW_FILES:
        raise InvalidRequest(f"{path}: a set is a .jsonl, .json or .parquet file, or a folder", param="set")
    columns = columns_of(path)
    if "image_1" in columns or "question_type" in columns:
        return "mmmu"
    if path.suffix == ".parquet" and {"question_id", "image"} <= columns:
        return "mme" if "category" in columns and "answer" in columns else "textvqa"
    return "jsonl"


def _row_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in ROW_FILES and path.is_file())


def _read(path: Path, format_: str, metric: Metric) -> Read:
    readers: dict[str, Callable[[Path], Read]] = {
        "jsonl": lambda file: read_jsonl(file, metric),
        "textvqa": read_textvqa,
        "mme": read_mme,
        "mmmu": read_mmmu,
    }
    files = _row_files(path) if path.is_dir() else []
    read = [readers[format_](file) for file in files or [path]]
    return list(chain(*(one[0] for one in read))), list(chain(*(one[1] for one in read)))
