"""The demo's fixed questions, half of them about pictures; each knows what a right answer says.

Comes in: nothing. Goes out: `training()` and `held_out()`, which share neither a filled-in question nor a picture:
held-out people are never met in training, held-out pictures are of combinations that the eyes never saw.
"""

from __future__ import annotations

from functools import cache
from itertools import chain, cycle

from noria.evals.named.embedded import as_asked
from noria.evals.questions import Question
from noria.scenes import scene_questions
from noria.scenes.drawn.questions import TELL
from noria.scenes.drawn.words import HELD_OUT, TRAIN

PICTURES = "pictures"
"""The `file` of questions about pictures."""
_EACH = 12  # pictures of a kind
_SEED = {TRAIN: 70_000, HELD_OUT: 80_000}  # neither the recipe's nor the evaluation's

_TEMPLATES: tuple[tuple[str, str], ...] = (
    ("{name} has a {colour} bicycle. What colour is the bicycle of {name}?", "colour"),
    ("{name} lives in {city}. Where does {name} live?", "city"),
    ("The pet of {name} is a {animal}. What pet does {name} have?", "animal"),
    ("{name} works as a {job}. What is the job of {name}?", "job"),
    ("{name} likes to drink {drink}. What does {name} drink?", "drink"),
    ("{name} plays the {instrument}. Which instrument does {name} play?", "instrument"),
    ("{name} travels on {day}. On which day does {name} travel?", "day"),
    ("{name} eats {fruit} every morning. What does {name} eat?", "fruit"),
)
_NAMES = {
    "training": ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"],
    "held_out": ["Nora", "Oscar", "Paula", "Robin", "Sarah", "Tom", "Uma", "Will"],
}
_FILLERS = {
    "colour": ["red", "blue", "green", "yellow", "black", "white", "orange", "purple"],
    "city": ["Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo"],
    "animal": ["dog", "cat", "rabbit", "horse", "parrot", "turtle", "goat", "hamster"],
    "job": ["teacher", "doctor", "baker", "farmer", "pilot", "nurse", "painter", "lawyer"],
    "drink": ["tea", "coffee", "milk", "juice", "lemonade", "water", "cider", "soda"],
    "instrument": ["piano", "guitar", "violin", "flute", "drums", "trumpet", "cello", "harp"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "fruit": ["apples", "bananas", "cherries", "grapes", "oranges", "pears", "plums", "peaches"],
}


@cache
def training() -> tuple[Question, ...]:
    """The questions whose answers the annotator judges: about people and about pictures, in turn."""
    return _in_turn(_about_people("training", 0), _about_pictures(TRAIN))


@cache
def held_out() -> tuple[Question, ...]:
    """The questions on which versions are compared."""
    return _in_turn(_about_people("held_out", 5), _about_pictures(HELD_OUT))


def _about_people(who: str, first_filler: int) -> list[Question]:
    fillers = {kind: cycle(words[first_filler:] + words[:first_filler]) for kind, words in _FILLERS.items()}
    questions = []
    for name in _NAMES[who]:
        for template, kind in _TEMPLATES:
            fact = next(fillers[kind])
            prompt = template.format(name=name, **{kind: fact}) + TELL
            questions.append(Question(f"{name}-{kind}", prompt, (fact,), "contains", category=kind, file="people"))
    return questions


def _about_pictures(split: str) -> list[Question]:
    return as_asked(scene_questions(split, _SEED[split], _EACH), PICTURES, TELL)


def _in_turn(first: list[Question], second: list[Question]) -> tuple[Question, ...]:
    """Both spread evenly over the whole, each in its order."""
    spread = chain(
        (((place + 0.5) / len(some), one) for some in (first, second) for place, one in enumerate(some)),
    )
    return tuple(one for _, one in sorted(spread, key=lambda placed: placed[0]))
