"""What an evaluation asks: questions with their pictures and right answers, in sets that a hash names.

Comes in: questions as a reader gives them. Goes out: a `QuestionSet` whose every picture was read once, and whose hash
changes with anything that the model is shown or judged by. Pillow is imported when the first picture is checked.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from noria.errors import InvalidRequest
from noria.records import BadRow, Json

Metric = Literal["exact", "contains", "choice", "number", "anls", "vqa", "yes_no"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAKEN = ("image/png", "image/jpeg", "image/webp", "image/gif")  # by default (input.images.formats)
MARK = re.compile(r"<image ([1-9][0-9]?)>")  # where a picture stands inside the text, counted from 1


@dataclass(frozen=True)
class Picture:
    """A picture by what the row calls it; `read` gives the file's bytes, as often as asked."""

    ref: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Question:
    """One question. `prompt` is the whole text that the model gets; `file` and `line` are where it was read.

    Pictures come before the text, in order, but where the text says `<image 2>` the second one stands there. `group`
    names questions that count together when all of them are right. `tolerance` is that of the metric `number`.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    metric: Metric
    pictures: tuple[Picture, ...] = ()
    options: tuple[str, ...] = ()
    category: str = ""
    group: str | None = None
    tolerance: float = 0.0
    file: str = ""
    line: int = 0

    def parts(self) -> list[str | Picture]:
        """Text and pictures in the order in which the model sees them."""
        marked = {int(number) for number in MARK.findall(self.prompt)}
        parts: list[str | Picture] = [
            picture for number, picture in enumerate(self.pictures, 1) if number not in marked
        ]
        shown: set[int] = set()
        start = 0
        for found in MARK.finditer(self.prompt):
            number = int(found[1])
            if number > len(self.pictures) or number in shown:
                continue  # shown already, or never there: the words stay
            shown.add(number)
            parts += [self.prompt[start : found.start()].strip(), self.pictures[number - 1]]
            start = found.end()
        return [part for part in [*parts, self.prompt[start:].strip()] if part]


@dataclass(frozen=True)
class QuestionSet:
    """A set that can be asked. `hash` is `sha256:..` over all that is shown and judged; `pictures` holds the sha256
    of each question's pictures."""

    name: str
    hash: str
    questions: tuple[Question, ...]
    pictures: tuple[tuple[str, ...], ...]
    bad: tuple[BadRow, ...] = ()


def make_set(name: str, questions: Sequence[Question], bad: Sequence[BadRow] = ()) -> QuestionSet:
    """Reads every picture once and hashes the set; a question with a picture that cannot be read is a bad row.

    Raises InvalidRequest when no question is left.
    """
    good: list[Question] = []
    pictures: list[tuple[str, ...]] = []
    found, digest = list(bad), hashlib.sha256()
    for question in questions:
        try:
            shown = tuple(_checked(picture) for picture in question.pictures)
        except (OSError, ValueError) as error:
            found.append(BadRow(question.file, question.line, _one_line(error)))
            continue
        good.append(question)
        pictures.append(shown)
        digest.update(json.dumps(_judged(question, shown), sort_keys=True).encode() + b"\n")
    if not good:
        first = f": {found[0].file}:{found[0].line}: {found[0].reason}" if found else ""
        raise InvalidRequest(f"the set {name} holds no question that can be asked{first}", param="set")
    found.sort(key=lambda row: (row.file, row.line))
    return QuestionSet(name, f"sha256:{digest.hexdigest()}", tuple(good), tuple(pictures), tuple(found))


def content_of(question: Question) -> str | list[Json]:
    """The content of the user's message, OpenAI-shaped: plain text where there is no picture."""
    if not question.pictures:
        return question.prompt
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part.read())}}
        for part in question.parts()
    ]


def data_url(data: bytes) -> str:
    """The picture as a `data:` URL: as it is where every server takes its kind (`TAKEN`), else as a PNG of its pixels.

    Raises OSError or ValueError for bytes that Pillow does not know.
    """
    kind = media_type(data)
    if kind not in TAKEN:
        kind, data = "image/png", _as_png(data)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def media_type(data: bytes) -> str:
    """What kind of picture the bytes are, by their head. Raises ValueError where Pillow does not know them."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return Image.MIME.get(picture.format or "", "application/octet-stream")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"{len(data)} bytes that are no picture") from error


def _as_png(data: bytes) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        held = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (picture if held else picture.convert("RGB")).save(out, "PNG")
    return out.getvalue()


def _checked(picture: Picture) -> str:
    data = picture.read()
    try:
        media_type(data)
    except ValueError as error:
        raise ValueError(f"picture {picture.ref[:200]}: {error}") from error
    return hashlib.sha256(data).hexdigest()


def _judged(question: Question, pictures: tuple[str, ...]) -> Json:
    keys = ("prompt", "answers", "metric", "options", "category", "group", "tolerance")
    return {**{key: getattr(question, key) for key in keys}, "pictures": pictures}


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"picture {error.filename or error} is not there"
    return " ".join(str(error).split()) or type(error).__name__
