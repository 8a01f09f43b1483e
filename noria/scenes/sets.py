"""Data sets of made pictures, as rows that any reader of training data understands.

Comes in: a set's name (`scenes`, `digits`, `photos`, `text`), a stage's kind, a split, a seed. For the kinds `vision`
and `words` a set of pictures may have `-written` behind its name: what is true is then laid out as a text
(`write_labels`). Goes out: rows: labels for those kinds, conversations in OpenAI's shape for the others. The same call
gives the same rows. Must not import Pillow or numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from noria.errors import InvalidRequest
from noria.methods.table import LABELLED_KINDS
from noria.records import Json
from noria.scenes import handwriting, photos
from noria.scenes.drawn.questions import WHICH_DIGIT, ask, caption, told
from noria.scenes.drawn.scene import read_scene, scene_ref
from noria.scenes.drawn.words import SPLITS
from noria.scenes.labels import Labels, read_labels, write_labels
from noria.scenes.replay import replayed

WRITTEN = "-written"
_PICTURES = ("scenes", "digits", "photos")
SETS = (*_PICTURES, "text", *(f"{name}{WRITTEN}" for name in _PICTURES))
DEFAULT_COUNT = {"scenes": 10_000, "digits": 1_400, "photos": 200}
_SHARES = {"one": 0.25, "two": 0.3, "many": 0.25, "digit": 0.2}
_DESCRIBE = ("Describe the picture.", "What does the picture show?", "What do you see?")
_MOST_TURNS = 5
_TOLD = 0.15


def rows(name: str, kind: str, *, split: str, count: int | None, seed: int) -> Iterator[Json]:
    """The rows of a set; `count` none is the set's own size. Raises InvalidRequest for an unknown set or split.

    `vision` and `words` give `{"image", "labels", "objects"}`, every other kind `{"messages"}`.
    """
    if name not in SETS:
        raise InvalidRequest(f"no set is called {name!r}; there are {', '.join(SETS)}", param="source")
    if split not in SPLITS:
        raise InvalidRequest(f"the set {name!r} has no split {split!r}; there are {', '.join(SPLITS)}", param="split")
    if name == "text":
        if kind in LABELLED_KINDS:
            raise InvalidRequest(f"the set 'text' has no pictures for a stage of kind {kind}", param="source")
        return replayed(count, seed)
    if name.endswith(WRITTEN) and kind not in LABELLED_KINDS:
        raise InvalidRequest(f"the set {name!r} is labels, for stages of kind vision and words alone", param="source")
    pictures = name.removesuffix(WRITTEN)
    return _picture_rows(name, kind, split, DEFAULT_COUNT[pictures] if count is None else count, seed)


def _picture_rows(name: str, kind: str, split: str, count: int, seed: int) -> Iterator[Json]:
    pictures, labels = name.removesuffix(WRITTEN), write_labels if name.endswith(WRITTEN) else read_labels
    for index in range(count):
        rng = random.Random(f"{pictures}/{split}/{seed}/{index}")  # noqa: S311 - no secret
        ref = _ref(pictures, split, seed, index, rng)
        yield _label_row(ref, labels(ref)) if kind in LABELLED_KINDS else _dialogue(ref, kind, rng)


def _ref(name: str, split: str, seed: int, index: int, rng: random.Random) -> str:
    if name == "digits":
        return handwriting.digit_ref(split, seed, index)
    if name == "photos":
        return photos.photo_ref(split, tuple(photos.PHOTOS)[index % len(photos.PHOTOS)], seed * 1_000_003 + index)
    kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    return scene_ref(split, kind, seed, index)


def _label_row(ref: str, labels: Labels) -> Json:
    objects = [{"label": words, "box": corners} for words, *corners in labels.boxes]
    return {"image": ref, "labels": labels.attributes, "objects": objects}


def _dialogue(ref: str, kind: str, rng: random.Random) -> Json:
    """Some questions in random order; for `align` a description is among them, else a few are told in a sentence.

    Not for `grpo`: a reward knows one right answer, and there are many right sentences.
    """
    turns, described = _turns(ref, rng)
    rng.shuffle(turns)
    if kind not in ("align", "grpo") and not ref.startswith(photos.PREFIX):
        turns = [told(*turn, rng) if rng.random() < _TOLD else turn for turn in turns]
    if described is not None and (kind == "align" or rng.random() < 0.2):
        turns.insert(rng.randrange(min(2, len(turns)) + 1), (rng.choice(_DESCRIBE), described))
    messages: list[Json] = []
    for question, answer in turns[:_MOST_TURNS]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages[0] = picture_message(ref, turns[0][0])
    return {"messages": messages}


def picture_message(ref: str, question: str) -> Json:
    """A user's message: the picture, then the question."""
    picture = {"type": "image_url", "image_url": {"url": ref}}
    return {"role": "user", "content": [picture, {"type": "text", "text": question}]}


def _turns(ref: str, rng: random.Random) -> tuple[list[tuple[str, str]], str | None]:
    if ref.startswith(handwriting.PREFIX):
        return [(rng.choice(WHICH_DIGIT), handwriting.read_digit(ref))], None
    if ref.startswith(photos.PREFIX):
        return [(rng.choice(_DESCRIBE), f"The picture shows {photos.read_photo(ref)[1]}.")], None
    scene = read_scene(ref)
    return [(one.question, one.answer) for one in ask(scene, rng)], caption(scene)
