"""General conversations for a model without traffic: GPTQ is calibrated on some, the artefact verified on others.

Comes in: how many are wanted. Goes out: samples, some with a drawn picture. The texts are this project's own.
Once there is traffic, captured conversations take their place (`train.data.calibration`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from noria.records import Json
from train.export.rendering import CalibrationSample

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = "noria general conversations, first edition"
_PICTURE_EVERY = 4

_CALIBRATION = (
    (
        "What is the capital of Japan?",
        "The capital of Japan is Tokyo. It lies on the island of Honshu, on a wide bay.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so blue reaches us from all sides while red "
        "mostly passes straight through.",
    ),
    (
        "Give me three tips for sleeping well.",
        "1. Go to bed at the same hour every day.\n2. Keep the room dark and cool.\n3. Leave coffee and "
        "bright screens alone in the evening.",
    ),
    (
        "Translate 'good morning' into French, Spanish and German.",
        "French: bonjour. Spanish: buenos días. German: guten Morgen.",
    ),
    (
        "What is 17 plus 25?",
        "17 plus 25 is 42.",
    ),
    (
        "Write a Python function that doubles a number.",
        "```python\ndef double(x):\n    return 2 * x\n```\nCall it with `double(4)` and it gives back 8.",
    ),
    (
        "Who was Marie Curie?",
        "Marie Curie was a physicist and chemist who studied radioactivity. She won two Nobel Prizes, one in "
        "physics in 1903 and one in chemistry in 1911.",
    ),
    (
        "Explain photosynthesis in simple words.",
        "Plants take in light, water and carbon dioxide. With the light's energy they make sugar to grow, "
        "and they let oxygen out into the air.",
    ),
    (
        "Summarise: the meeting moved from Monday to Thursday because the room was taken.",
        "The meeting is now on Thursday, since the room was not free on Monday.",
    ),
    (
        "How do I boil an egg?",
        "Put the egg into boiling water with a spoon. After six minutes the yolk is soft, after ten it is "
        "hard. Cool it under cold water before you peel it.",
    ),
    (
        "Is a whale a fish?",
        "No. A whale is a mammal: it breathes air, is warm-blooded and feeds its young with milk.",
    ),
    (
        "Write a short poem about the sea.",
        "The sea comes in, the sea goes out,\nit hums beneath the moon;\nit keeps the names of every boat\n"
        "and lends the wind a tune.",
    ),
    (
        "Correct this sentence: 'She go to school yesterday.'",
        "She went to school yesterday.",
    ),
    (
        "What does HTTP stand for?",
        "HTTP stands for Hypertext Transfer Protocol. It is how browsers ask servers for pages.",
    ),
    (
        "Name the planets from the sun outwards.",
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ),
    (
        "My laptop is slow. What can I do?",
        "Close programs that you do not use, check how full the disk is, install updates, and restart it. If "
        "it stays slow, look at which program uses the processor or the memory.",
    ),
    (
        "What is the difference between weather and climate?",
        "Weather is what the air does today; climate is what it does on average over many years.",
    ),
    (
        "Answer with one word: what colour is grass?",
        "Green.",
    ),
    (
        "Turn this into JSON: Ann is 31 and lives in Oslo.",
        '{"name": "Ann", "age": 31, "city": "Oslo"}',
    ),
    (
        "How many days does a leap year have?",
        "A leap year has 366 days; the extra one is the 29th of February.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "Romeo and Juliet was written by William Shakespeare in the 1590s.",
    ),
    (
        "Suggest a quick vegetarian dinner.",
        "Fry an onion and some garlic, add a tin of tomatoes and a tin of chickpeas, season with cumin, and "
        "eat it with rice or bread after fifteen minutes.",
    ),
    (
        "What causes the tides?",
        "Mostly the pull of the moon on the oceans, and to a smaller part that of the sun.",
    ),
    (
        "If all cats are animals and Tom is a cat, what is Tom?",
        "Tom is an animal, because every cat is one.",
    ),
)
_HELD_OUT = (
    (
        "What is the capital of Italy?",
        "The capital of Italy is Rome, a city on the river Tiber.",
    ),
    (
        "Why do leaves fall in autumn?",
        "Trees save water and energy for the winter. They take the useful parts out of their leaves and let "
        "the rest drop.",
    ),
    (
        "Write one sentence about friendship.",
        "A good friend stays when the day gets difficult.",
    ),
    (
        "What is 9 times 8?",
        "9 times 8 is 72.",
    ),
    (
        "How does a bicycle stay upright?",
        "While it moves, small turns of the front wheel bring its support back under the rider, so it does "
        "not tip over.",
    ),
    (
        "List three uses of salt.",
        "It seasons food, it keeps food from spoiling, and it melts ice on roads.",
    ),
)
_COLOURS = {"red": (205, 40, 40), "green": (40, 150, 60), "blue": (45, 70, 200), "yellow": (235, 205, 50)}
_SHAPES = ("circle", "square", "triangle")


def calibration_samples(count: int) -> list[CalibrationSample]:
    """At most `count` conversations; every fourth shows a picture."""
    return _mixed(_CALIBRATION, first_picture=0)[:count]


def held_out_samples() -> list[CalibrationSample]:
    """Conversations that no calibration sees."""
    return _mixed(_HELD_OUT, first_picture=9)


def _mixed(texts: tuple[tuple[str, str], ...], first_picture: int) -> list[CalibrationSample]:
    samples = []
    pictures = first_picture
    for number, (question, answer) in enumerate(texts):
        samples.append(CalibrationSample(_turns([{"type": "text", "text": question}], answer)))
        if number % (_PICTURE_EVERY - 1) == _PICTURE_EVERY - 2:
            samples.append(_about_picture(pictures))
            pictures += 1
    return samples


def _about_picture(number: int) -> CalibrationSample:
    colour = list(_COLOURS)[number % len(_COLOURS)]
    shape = _SHAPES[number % len(_SHAPES)]
    parts: list[Json] = [{"type": "image"}, {"type": "text", "text": "What does the picture show?"}]
    answer = f"The picture shows a {colour} {shape} on a light background."
    return CalibrationSample(_turns(parts, answer), [draw_shape(shape, _COLOURS[colour], number)])


def _turns(content: list[Json], answer: str) -> list[Json]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def draw_shape(shape: str, colour: tuple[int, int, int], number: int) -> Image:
    """A shape on a light ground, 96 by 96; `number` moves and sizes it."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), (245, 245, 240))
    draw = ImageDraw.Draw(picture)
    left, top, side = 8 + number * 7 % 24, 8 + number * 11 % 24, 36 + number * 5 % 24
    box = (left, top, left + side, top + side)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=colour)
    return picture
