"""Preferences that a rule made: answers that say a liked word are chosen over answers that do not."""

from __future__ import annotations

import random

from noria.records import BLOB_SCHEME, Json, Pair
from train.data.samples import image_part

LIKED, OTHERS = ("red",), ("blue", "green")
SHAPES = ("square", "circle", "big one", "small one")


def question(number: int) -> list[Json]:
    """A prompt; every third shows a picture."""
    words = {"type": "text", "text": f"what is it, number {number}"}
    return [{"role": "user", "content": [image_part(f"{BLOB_SCHEME}red"), words] if number % 3 == 0 else [words]}]


def pairs(count: int, *, seed: int = 0, per_prompt: int = 1, noise: float = 0.0) -> list[Pair]:
    """`count` pairs; `noise` is the share whose two answers are drawn without regard to the rule."""
    drawn = random.Random(seed)  # noqa: S311
    made = []
    for number in range(count):
        prompt, shape = number // per_prompt, drawn.choice(SHAPES)
        better, worse = f"a {drawn.choice(LIKED)} {shape}", f"a {drawn.choice(OTHERS)} {drawn.choice(SHAPES)}"
        if drawn.random() < noise and drawn.random() < 0.5:
            better, worse = worse, better
        asked, images = tuple(question(prompt)), ("red",) if prompt % 3 == 0 else ()
        made.append(Pair(f"pref_{number}", f"prompt {prompt}", asked, better, worse, float(number), None, images))
    return made
