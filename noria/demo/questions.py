"""The demo's fixed questions: each carries the fact that a right answer must contain.

Comes in: nothing. Goes out: `TRAINING` and `HELD_OUT`, which share no filled-in question.
Must not import anything from Noria.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle


@dataclass(frozen=True)
class Question:
    """One user's message and the word that a right answer contains (compared without case)."""

    prompt: str
    fact: str


_TEMPLATES: tuple[tuple[str, str], ...] = (
    ("{name} has a {colour} bicycle. What colour is the bicycle of {name}? Tell me about it.", "colour"),
    ("{name} lives in {city}. Where does {name} live? Tell me about it.", "city"),
    ("The pet of {name} is a {animal}. What pet does {name} have? Tell me about it.", "animal"),
    ("{name} works as a {job}. What is the job of {name}? Tell me about it.", "job"),
    ("{name} likes to drink {drink}. What does {name} drink? Tell me about it.", "drink"),
    ("{name} plays the {instrument}. Which instrument does {name} play? Tell me about it.", "instrument"),
    ("{name} travels on {day}. On which day does {name} travel? Tell me about it.", "day"),
    ("{name} eats {fruit} every morning. What does {name} eat? Tell me about it.", "fruit"),
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


def _fill(names: list[str], first_filler: int) -> tuple[Question, ...]:
    fillers = {kind: cycle(words[first_filler:] + words[:first_filler]) for kind, words in _FILLERS.items()}
    questions = []
    for name in names:
        for template, kind in _TEMPLATES:
            fact = next(fillers[kind])
            questions.append(Question(template.format(name=name, **{kind: fact}), fact))
    return tuple(questions)


TRAINING: tuple[Question, ...] = _fill(_NAMES["training"], 0)
"""96 questions whose answers the annotator judges."""

HELD_OUT: tuple[Question, ...] = _fill(_NAMES["held_out"], 5)
"""64 questions, of people never met in training, on which versions are compared."""
