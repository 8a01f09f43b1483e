"""The questions that the embedded model's eyes are judged by.

Comes in: how many of each kind. Goes out: questions about pictures whose seed and combinations training never saw.
Written digits are of rows that training never saw. Must not import Pillow or numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from noria.scenes import handwriting
from noria.scenes.drawn import questions
from noria.scenes.drawn.scene import read_scene, scene_ref
from noria.scenes.drawn.words import HELD_OUT, MOST_THINGS

SEED = 1_000
"""Seed of the pictures; training uses small ones."""
HANDWRITING = "handwriting"
_DRAWN = {
    questions.COLOUR: "one",
    questions.SHAPE: "one",
    questions.COUNT: "many",
    questions.LEFT_RIGHT: "two",
    questions.DIGIT: "digit",
}
KINDS = (*_DRAWN, HANDWRITING)
"""The kinds of held-out questions, in order."""


@dataclass(frozen=True)
class HeldOut:
    """One question: its kind, its picture's reference, the right answer."""

    kind: str
    image: str
    question: str
    answer: str


def held_out_questions(each: int = 200) -> list[HeldOut]:
    """`each` questions of every kind, always the same. Every question has a picture of its own."""
    drawn = [one for number, kind in enumerate(_DRAWN) for one in _some(kind, each, SEED + number)]
    return drawn + [_written(index) for index in range(each)]


def _some(kind: str, each: int, seed: int) -> list[HeldOut]:
    """The first that fit; numbers take turns, so that always saying 1 earns a third and no more."""
    found: list[HeldOut] = []
    for one in _asked(kind, seed):
        if kind == questions.COUNT and one.answer != str(1 + len(found) % MOST_THINGS):
            continue
        found.append(one)
        if len(found) == each:
            break
    return found


def _asked(kind: str, seed: int) -> Iterator[HeldOut]:
    index = 0
    while True:
        ref = scene_ref(HELD_OUT, _DRAWN[kind], seed, index)
        rng = random.Random(f"held out/{ref}")  # noqa: S311 - no secret
        fitting = [one for one in questions.ask(read_scene(ref), rng) if one.kind == kind]
        if fitting:
            one = rng.choice(fitting)
            yield HeldOut(kind, ref, one.question, one.answer)
        index += 1


def _written(index: int) -> HeldOut:
    ref = handwriting.digit_ref(HELD_OUT, SEED, index)
    wording = questions.WHICH_DIGIT[index % len(questions.WHICH_DIGIT)]
    return HeldOut(HANDWRITING, ref, wording, handwriting.read_digit(ref))
