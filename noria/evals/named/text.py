"""`embedded-text`: forty plain questions that a small language model can answer, without a picture.

Comes in: nothing. Goes out: the questions; an answer is right when it holds the fact as whole words. They are for
comparing a model before and after training on pictures, not for telling large models apart, and nothing is ever trained
on them.
"""

from __future__ import annotations

from noria.evals.questions import Question

_FACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "places": (
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Italy?", "Rome"),
        ("What is the capital of Japan?", "Tokyo"),
        ("What is the capital of Germany?", "Berlin"),
        ("What is the capital of Spain?", "Madrid"),
        ("What is the capital of England?", "London"),
        ("What is the capital of Russia?", "Moscow"),
        ("What is the capital of China?", "Beijing"),
        ("On which continent is Egypt?", "Africa"),
        ("Which is the largest ocean on Earth?", "Pacific"),
    ),
    "nature": (
        ("What is the chemical formula of water?", "H2O"),
        ("Which planet is the largest in the solar system?", "Jupiter"),
        ("Which planet do we live on?", "Earth"),
        ("What star is at the centre of our solar system?", "Sun"),
        ("What gas do plants take in from the air for photosynthesis?", "carbon dioxide"),
        ("What gas do people need to breathe to stay alive?", "oxygen"),
        ("What is the name of the force that pulls things towards the Earth?", "gravity"),
        ("Which organ pumps blood through the body?", "heart"),
        ("What is frozen water called?", "ice"),
        ("What do bees make from nectar?", "honey"),
    ),
    "words": (
        ("What is the opposite of hot?", "cold"),
        ("What is the opposite of up?", "down"),
        ("What is the opposite of big?", "small"),
        ("What is the opposite of day?", "night"),
        ("What is the plural of the word cat?", "cats"),
        ("What is the first letter of the English alphabet?", "A"),
        ("What is a baby dog called?", "puppy"),
        ("What is a baby cat called?", "kitten"),
        ("Which animal says moo?", "cow"),
        ("Which month comes after January?", "February"),
    ),
    "given": (
        ("Anna has a red ball. What colour is Anna's ball?", "red"),
        ("Tom lives in Oslo. In which city does Tom live?", "Oslo"),
        ("The dog of Mary is called Rex. What is the name of Mary's dog?", "Rex"),
        ("Peter bought a book and a lamp. What did Peter buy besides a book?", "lamp"),
        ("The train leaves at noon. When does the train leave?", "noon"),
        ("Lisa works as a nurse. What is Lisa's job?", "nurse"),
        ("My favourite fruit is the mango. What is my favourite fruit?", "mango"),
        ("Jack is taller than Bill. Who is taller?", "Jack"),
        ("The box holds seven coins. What does the box hold?", "coins"),
        ("Sara speaks Greek. Which language does Sara speak?", "Greek"),
    ),
}


def text_questions() -> tuple[Question, ...]:
    """The forty, in a fixed order and under fixed ids."""
    return tuple(
        Question(f"{kind}-{number}", text, (fact,), "contains", category=kind, file="embedded-text", line=number)
        for kind, facts in _FACTS.items()
        for number, (text, fact) in enumerate(facts, 1)
    )
