"""Questions about made pictures, one a picture: what the embedded model's eyes are judged by, and what the demo asks.

Comes in: a split, how many of each kind. Goes out: questions, always the same. Those of the split `held_out` are about
pictures whose seed and combinations training never saw, and digits that other hands wrote.
Must not import Pillow or numpy.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from noria.scenes import handwriting
from noria.scenes.drawn import questions
from noria.scenes.drawn.scene import read_scene, scene_ref
from noria.scenes.drawn.words import HELD_OUT, MOST_THINGS

SEED = 1_000
"""Seed of the held-out pictures; training uses small ones."""
HANDWRITING = "handwriting"
_JUDGED = {
    questions.COLOUR: "one",
    questions.SHAPE: "one",
    questions.COUNT: "many",
    questions.LEFT_RIGHT: "two",
    questions.DIGIT: "digit",
}
_DRAWN = {
    **_JUDGED,
    questions.SIZE: "one",
    questions.ABOVE_BELOW: "two",
    questions.THERE: "many",
    questions.PLACED: "two",
}
DRAWN_KINDS = tuple(_DRAWN)
"""The kinds of questions about drawn scenes, in order."""
JUDGED_KINDS = tuple(_JUDGED)
"""Those that the eyes are judged by."""
KINDS = (*JUDGED_KINDS, HANDWRITING)
"""The kinds of held-out questions, in order."""


@dataclass(frozen=True)
class PictureQuestion:
    """One question: its kind, its picture's reference, the right answer."""

    kind: str
    image: str
    question: str
    answer: str


def held_out_questions(each: int = 200) -> list[PictureQuestion]:
    """`each` questions of every kind, handwriting included."""
    return scene_questions(HELD_OUT, SEED, each) + [_written(index) for index in range(each)]


def scene_questions(split: str, seed: int, each: int, kinds: Collection[str] = JUDGED_KINDS) -> list[PictureQuestion]:
    """`each` questions of every kind about drawn scenes of a split; kinds have seeds of their own, from `seed` on."""
    wanted = [(seed + number, kind) for number, kind in enumerate(DRAWN_KINDS) if kind in kinds]
    return [one for of, kind in wanted for one in _some(kind, each, split, of)]


def _some(kind: str, each: int, split: str, seed: int) -> list[PictureQuestion]:
    """The first that fit; numbers take turns, so that always saying 1 earns a third and no more."""
    found: list[PictureQuestion] = []
    for one in _asked(kind, split, seed):
        if kind == questions.COUNT and one.answer != str(1 + len(found) % MOST_THINGS):
            continue
        found.append(one)
        if len(found) == each:
            break
    return found


def _asked(kind: str, split: str, seed: int) -> Iterator[PictureQuestion]:
    index = 0
    while True:
        ref = scene_ref(split, _DRAWN[kind], seed, index)
        rng = random.Random(f"asked/{ref}")  # noqa: S311 - no secret
        scene = read_scene(ref)
        fitting = [one for one in [*questions.ask(scene, rng), *questions.ask_placed(scene, rng)] if one.kind == kind]
        if fitting:
            one = rng.choice(fitting)
            yield PictureQuestion(kind, ref, one.question, one.answer)
        index += 1


def _written(index: int) -> PictureQuestion:
    ref = handwriting.digit_ref(HELD_OUT, SEED, index)
    wording = questions.WHICH_DIGIT[index % len(questions.WHICH_DIGIT)]
    return PictureQuestion(HANDWRITING, ref, wording, handwriting.read_digit(ref))
