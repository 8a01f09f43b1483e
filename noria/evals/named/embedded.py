"""`embedded`: held-out drawn scenes and written digits, what the embedded model's eyes are judged by.

Comes in: nothing. Goes out: the held-out questions of `noria.scenes`, on seeds, combinations of colour and shape, and
handwriting that training never sees. Where the answer is one word of a small vocabulary, the model must say that word
and no other of them; a count or a digit is right as a numeral or as a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from noria.evals.questions import LETTERS, Question
from noria.evals.readers.pictures import picture_at
from noria.scenes import PictureQuestion, held_out_questions
from noria.scenes.drawn.words import COLOURS, SHAPES, SIZES

EACH = 200  # questions of a kind: at 90 % right the interval reaches 4 points to either side
WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "left/right": ("left", "right"),
    "above/below": ("above", "below"),
    "there": ("yes", "no"),
    "placed": (*COLOURS, *SHAPES),
}


def embedded_questions() -> list[Question]:
    """`EACH` questions of every kind, in a fixed order: the same pictures and words on every machine."""
    return as_asked(held_out_questions(EACH), "embedded")


def as_asked(pictures: Sequence[PictureQuestion], file: str, more: str = "") -> list[Question]:
    """Questions about made pictures as an evaluation asks and scores them; `more` is said after each."""
    seen: Counter[str] = Counter()
    questions = []
    for one in pictures:
        seen[one.kind] += 1
        questions.append(_question(one, seen[one.kind], file, more))
    return questions


def _question(one: PictureQuestion, number: int, file: str, more: str) -> Question:
    words = WORDS.get(one.kind, ())
    return Question(
        id=f"{one.kind}-{number}",
        prompt=one.question + more,
        answers=(LETTERS[words.index(one.answer)] if words else one.answer,),
        metric="choice" if words else "number",
        pictures=(picture_at(one.image, Path()),),
        options=words,
        category=one.kind,
        file=file,
        line=number,
    )
