"""What people could ask about a scene, with the one right answer to each.

Comes in: a `Scene`. Goes out: questions with short exact answers, and a caption.
An answer is a word or a numeral in lower case; a caption is one sentence.
Must not import Pillow or numpy.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from noria.scenes.drawn.scene import Scene, Thing, side_of
from noria.scenes.drawn.words import COLOURS, SHAPES

COUNT, COLOUR, SHAPE, SIZE, DIGIT = "count", "colour", "shape", "size", "digit"
LEFT_RIGHT, ABOVE_BELOW, THERE = "left/right", "above/below", "there"
PLACED = "placed"


_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Asked:
    """A question about a picture, its answer, and its kind."""

    kind: str
    question: str
    answer: str


def ask(scene: Scene, rng: random.Random) -> list[Asked]:
    """All that a scene can be asked, one wording of each, in a fixed order."""
    if scene.kind == "digit":
        return _about_digit(scene.things[0], rng)
    asked = [_count(scene, rng)]
    if len(scene.things) == 1:
        asked += _about_one(scene.things[0], rng)
    elif scene.kind == "two":
        asked += _about_two(scene.things[0], scene.things[1], rng)
    else:
        asked += _count_some(scene, rng)
    return [*asked, _there(scene, rng)]


def ask_placed(scene: Scene, rng: random.Random) -> list[Asked]:
    """Of two things, one by its place: what colour, what shape. `ask` has no such question, so no training saw one."""
    if scene.kind != "two":
        return []
    first, second = scene.things
    asked = []
    for side in side_of(first, second):
        where = _PLACE[side]
        asked.append(Asked(PLACED, f"What colour is the shape {where}?", first.colour))
        asked.append(Asked(PLACED, f"What shape is {where}?", first.word))
    return [rng.choice(asked)]


_PLACE = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}


TELL = " Tell me about it."
"""Said after a question, it asks for a sentence in place of a word."""
_SENTENCES = (
    "It is {}.",
    "The answer is {}.",
    "I have looked at the picture, and the answer is {}.",
    "From what the picture shows, and as far as I can see, the answer is {}.",
)


def told(question: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """The same question and answer, asked for and said in a sentence; some sentences say more words than others."""
    return question + TELL, rng.choice(_SENTENCES).format(answer)


def caption(scene: Scene) -> str:
    """One sentence that says everything about the scene."""
    if scene.kind == "digit":
        digit = scene.things[0]
        return f"The picture shows the digit {digit.word} in {digit.colour}."
    things = scene.things
    if scene.kind == "two":
        first, second = things
        side = side_of(first, second)[0]
        return f"The picture shows {_described(first)} {_BESIDE[side]} {_described(second)}."
    if len({thing.name for thing in things}) == 1 and len(things) > 1:
        return f"The picture shows {len(things)} {_plural(things[0].name)}."
    parts = [_described(thing) for thing in sorted(things, key=lambda thing: thing.x)]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"The picture shows {listed}."


_BESIDE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def _about_digit(digit: Thing, rng: random.Random) -> list[Asked]:
    return [
        Asked(DIGIT, rng.choice(WHICH_DIGIT), digit.word),
        Asked(COLOUR, rng.choice(("What colour is the digit?", "Which colour does the digit have?")), digit.colour),
    ]


WHICH_DIGIT = ("Which digit is this?", "What digit does the picture show?", "Which digit is in the picture?")
"""Wordings for a drawn digit and a written one alike."""


def _about_one(thing: Thing, rng: random.Random) -> list[Asked]:
    colours = (f"What colour is the {thing.word}?", "What colour is the shape?", "Which colour does the shape have?")
    shapes = (f"What shape is the {thing.colour} thing?", "What shape is this?", "Which shape does the picture show?")
    return [
        Asked(COLOUR, rng.choice(colours), thing.colour),
        Asked(SHAPE, rng.choice(shapes), thing.word),
        Asked(SIZE, rng.choice((f"Is the {thing.word} small or large?", "Is the shape large or small?")), thing.size),
    ]


def _about_two(first: Thing, second: Thing, rng: random.Random) -> list[Asked]:
    if rng.random() < 0.5:
        first, second = second, first
    asked = []
    for side in side_of(first, second):
        pair = ("left", "right") if side in ("left", "right") else ("above", "below")
        kind = LEFT_RIGHT if side in ("left", "right") else ABOVE_BELOW
        one, other = rng.sample(pair, 2)
        the, of = rng.choice(((first.name, second.name), (first.word, second.word)))
        asked.append(Asked(kind, f"Is the {the} {one} or {other}{_OF[kind]} the {of}?", side))
    thing = rng.choice((first, second))
    return [
        *asked,
        Asked(COLOUR, f"What colour is the {thing.word}?", thing.colour),
        Asked(SHAPE, f"What shape is the {thing.colour} thing?", thing.word),
    ]


_OF = {LEFT_RIGHT: " of", ABOVE_BELOW: ""}


def _count(scene: Scene, rng: random.Random) -> Asked:
    wordings = ("How many shapes are there?", "How many shapes does the picture show?", "How many things do you see?")
    return Asked(COUNT, rng.choice(wordings), str(len(scene.things)))


def _count_some(scene: Scene, rng: random.Random) -> list[Asked]:
    shapes = Counter(thing.word for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    shape, colour = rng.choice(sorted(shapes)), rng.choice(sorted(colours))
    return [
        Asked(COUNT, f"How many {_plural(shape)} are there?", str(shapes[shape])),
        Asked(COUNT, f"How many {colour} shapes are there?", str(colours[colour])),
    ]


def _there(scene: Scene, rng: random.Random) -> Asked:
    """Is such a thing there? Half of the time it is; where not, one of its two words may still be."""
    if rng.random() < 0.5:
        return Asked(THERE, f"Is there {_a(rng.choice(scene.things).name)}?", "yes")
    held = {(thing.colour, thing.word) for thing in scene.things}
    colour, shape = rng.choice([pair for pair in _PAIRS if pair not in held])
    return Asked(THERE, f"Is there {_a(f'{colour} {shape}')}?", "no")


def _described(thing: Thing) -> str:
    return _a(f"{thing.size} {thing.name}")


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _plural(words: str) -> str:
    return f"{words}es" if words.endswith("ss") else f"{words}s"
