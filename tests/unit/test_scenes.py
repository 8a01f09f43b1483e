"""Made pictures: the same from the same reference, truthful, and held apart between training and judging."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from setuptools import Distribution

from noria.errors import InvalidRequest
from noria.evals.named.text import text_questions
from noria.records import Json
from noria.scenes import SETS, draw, held_out_questions, is_made, rows
from noria.scenes.asked import KINDS as ASKED_KINDS
from noria.scenes.drawn.questions import LEFT_RIGHT, TELL, ask, caption
from noria.scenes.drawn.scene import CLEAR, KINDS, Scene, read_scene, scene_ref, side_of
from noria.scenes.drawn.words import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    SHAPES,
    SIZES,
    Look,
    digit_looks,
    is_held_out,
    shape_looks,
)
from noria.scenes.handwriting import read_digit, rows_of
from noria.scenes.labels import CELLS, read_labels
from noria.scenes.photos import PHOTOS, photo_ref


def scenes(split: str, kind: str, count: int) -> list[Scene]:
    return [read_scene(scene_ref(split, kind, 0, index)) for index in range(count)]


def conversations(name: str, split: str, count: int) -> list[list[Json]]:
    return [row["messages"] for row in rows(name, "sft", split=split, count=count, seed=0)]


def image_of(messages: list[Json]) -> str:
    return str(messages[0]["content"][0]["image_url"]["url"])


@pytest.mark.parametrize("ref", ["scene:train/many/3/7", "digit:train/0/5", "photo:held_out/coffee/2"])
def test_the_reference_alone_decides_the_picture(ref: str) -> None:
    picture = draw(ref)
    assert (picture.size, picture.mode) == ((96, 96), "RGB")
    code = f"import hashlib; from noria.scenes import draw; print(hashlib.sha256(draw({ref!r}).tobytes()).hexdigest())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == hashlib.sha256(picture.tobytes()).hexdigest()
    assert is_made(ref) and not is_made("data:image/png;base64,AA==")


def test_other_references_give_other_pictures() -> None:
    refs = [scene_ref(split, kind, seed, 0) for split in ("train", "held_out") for kind in KINDS for seed in (0, 1)]
    assert len({draw(ref).tobytes() for ref in refs}) == len(refs)


MALFORMED = (
    *("scene:test/one/0/0", "scene:train/five/0/0", "scene:train/one/0", "scene:train/one/0/-1"),
    *("digit:train/0", "digit:other/0/0", "photo:train/dog/0", "picture.png"),
)


@pytest.mark.parametrize("ref", MALFORMED)
def test_a_reference_that_names_nothing_is_refused(ref: str) -> None:
    with pytest.raises(InvalidRequest):
        draw(ref)


def test_held_out_combinations_never_occur_in_training() -> None:
    for kind in KINDS:
        for split, expected in (("train", False), ("held_out", True)):
            for scene in scenes(split, kind, 300):
                looks = [Look(thing.colour, thing.word, thing.size) for thing in scene.things]
                assert {is_held_out(look, scene.background) for look in looks} == {expected}


def test_every_word_is_seen_in_training_and_asked_afterwards() -> None:
    for looks_of, words in ((shape_looks, SHAPES), (digit_looks, DIGITS)):
        for split in ("train", "held_out"):
            looks = {look for background in BACKGROUNDS for look in looks_of(split, background)}
            assert {look.colour for look in looks} == set(COLOURS)
            assert {look.word for look in looks} == set(words)
            assert {look.size for look in looks} == set(SIZES)
        trained = {look for background in BACKGROUNDS for look in looks_of("train", background)}
        assert trained == {Look(*words) for words in itertools.product(COLOURS, words, SIZES)}


def test_things_lie_inside_the_picture_and_apart() -> None:
    for scene in itertools.chain(*(scenes("train", kind, 300) for kind in KINDS)):
        for thing in scene.things:
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius
        for one, other in itertools.combinations(scene.things, 2):
            assert (one.x - other.x) ** 2 + (one.y - other.y) ** 2 > (one.radius + other.radius) ** 2


def test_the_picture_shows_the_colour_at_the_thing() -> None:
    for scene in scenes("train", "one", 200):
        thing = scene.things[0]
        pixels = np.asarray(draw(scene.ref), dtype=np.int32)
        x, y = int(thing.x * 96), int(thing.y * 96)
        middle = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
        nearest = min(COLOURS, key=lambda name: int(np.abs(middle - COLOURS[name]).sum()))
        assert nearest == thing.colour


def test_answers_are_true() -> None:
    for scene in itertools.chain(*(scenes("held_out", kind, 200) for kind in KINDS)):
        names = {thing.name for thing in scene.things}
        for one in ask(scene, random.Random(0)):  # noqa: S311
            if one.kind == "there":
                asked = one.question.removeprefix("Is there ").rstrip("?").split(" ", 1)[1]
                assert one.answer == ("yes" if asked in names else "no")
            if one.question.startswith("How many shapes") or one.question.startswith("How many things"):
                assert one.answer == str(len(scene.things))
            if one.kind == LEFT_RIGHT:
                words = one.question.rstrip("?").replace(" the ", " ").split()
                first, second = (
                    next(thing for thing in scene.things if thing.word == word)
                    for word in [word for word in words if word in SHAPES]
                )
                assert one.answer == ("left" if first.x < second.x else "right")
                assert abs(first.x - second.x) >= CLEAR


def test_labels_say_what_the_scene_holds() -> None:
    scene = next(scene for scene in scenes("train", "two", 50) if "left" in read_labels(scene.ref).boxes[0][0])
    labels = read_labels(scene.ref)
    first = scene.things[0]
    assert labels.attributes["count"] == "2"
    assert labels.boxes[0][0].split()[:4] == [first.size, first.colour, first.word, "left"]
    assert labels.boxes[1][0].split()[3] == "right"
    assert labels.boxes[0][1] == pytest.approx(first.x - first.radius)
    assert read_labels("digit:train/0/4").attributes == {"digit": read_digit("digit:train/0/4")}
    assert read_labels(photo_ref("train", "coffee", 0)).attributes == {"photo": "coffee"}


def test_captions_are_sentences() -> None:
    assert caption(read_scene("scene:train/digit/0/0")).startswith("The picture shows the digit ")
    for scene in scenes("train", "many", 50):
        assert all(thing.word in caption(scene) for thing in scene.things)
    for scene in scenes("train", "two", 50):
        assert any(word in caption(scene) for word in (" left of ", " right of ", " above ", " below "))


def test_rows_are_repeatable_and_of_the_kind_that_was_asked_for() -> None:
    for name in ("scenes", "digits", "photos", "text"):
        first = list(rows(name, "sft", split="train", count=40, seed=2))
        assert first == list(rows(name, "sft", split="train", count=40, seed=2))
        assert first != list(rows(name, "sft", split="train", count=40, seed=3))
        assert all(row["messages"][-1]["role"] == "assistant" for row in first)
    for name in (name for name in SETS if name != "text"):
        labelled = list(rows(name, "vision", split="train", count=20, seed=0))
        assert all((row["labels"] or row["objects"]) and is_made(row["image"]) for row in labelled)
    described = list(rows("scenes", "align", split="train", count=50, seed=0))
    assert all(any("picture shows" in str(message["content"]) for message in row["messages"]) for row in described)


def test_written_out_a_thing_is_a_row_and_a_word_is_a_cell() -> None:
    """Things from left to right; size, colour, what it is, its sides; behind them how many there are."""
    for row in rows("scenes-written", "vision", split="train", count=60, seed=1):
        scene = read_scene(row["image"])
        cells = {
            (round(box[1] * CELLS), round(box[0] * CELLS)): word for word, box in map(label_and_box, row["objects"])
        }
        things = sorted(scene.things, key=lambda thing: thing.x)
        assert [cells[number, 0] for number in range(len(things))] == [thing.size for thing in things]
        assert [cells[number, 1] for number in range(len(things))] == [thing.colour for thing in things]
        assert [cells[number, 2] for number in range(len(things))] == [thing.word for thing in things]
        assert cells.get((3, 0)) == (None if scene.kind == "digit" else str(len(things)))
        if len(things) == 2:
            sides = tuple(word for word in (cells.get((0, 3)), cells.get((0, 4))) if word)
            assert sides == side_of(things[0], things[1])
    assert [
        one["label"] for one in next(rows("digits-written", "vision", split="train", count=1, seed=0))["objects"]
    ] == ["0"]
    photo = next(rows("photos-written", "vision", split="train", count=1, seed=0))
    assert [one["label"] for one in photo["objects"]] == ["astronaut"]


def test_some_answers_are_sentences_where_a_sentence_is_asked_for() -> None:
    for name in ("scenes", "digits", "photos"):
        turns = [
            (str(question["content"]).rstrip("'}]"), answer["content"])
            for messages in conversations(name, "train", 150)
            for question, answer in zip(messages[::2], messages[1::2], strict=True)
        ]
        told = [answer for question, answer in turns if question.endswith(TELL)]
        assert all(answer.endswith(".") and " " in answer for answer in told)
        assert (0.05 < len(told) / len(turns) < 0.3) if name != "photos" else not told


def label_and_box(told: Json) -> tuple[str, list[float]]:
    return told["label"], told["box"]


def test_wrong_sets_splits_and_kinds_are_refused() -> None:
    wrong = [("shapes", "sft", "train"), ("scenes", "sft", "test"), ("text", "vision", "train")]
    for name, kind, split in (*wrong, ("scenes-written", "sft", "train"), ("text-written", "vision", "train")):
        with pytest.raises(InvalidRequest):
            rows(name, kind, split=split, count=1, seed=0)


def test_handwriting_and_photographs_are_the_real_ones() -> None:
    assert (len(rows_of("train")), len(rows_of("held_out"))) == (1400, 397)
    counts = Counter(read_digit(f"digit:train/0/{index}") for index in range(1400))
    assert set(counts) == set(DIGITS) and min(counts.values()) > 130
    assert set(rows_of("train")).isdisjoint(rows_of("held_out"))
    assert all(draw(photo_ref("train", name, 0)).getextrema() for name in PHOTOS)


def test_held_out_questions_are_many_fixed_and_of_their_own_pictures() -> None:
    asked = held_out_questions(60)
    assert asked == held_out_questions(60)
    assert Counter(one.kind for one in asked) == dict.fromkeys(ASKED_KINDS, 60)
    assert len({one.image for one in asked}) == len(asked)
    assert all(one.image.split(":")[1].startswith("held_out/") for one in asked)
    assert Counter(one.answer for one in asked if one.kind == "count") == {"1": 20, "2": 20, "3": 20}
    trained = {image_of(messages) for name in ("scenes", "digits") for messages in conversations(name, "train", 300)}
    assert trained.isdisjoint(one.image for one in asked)


def test_replayed_text_is_plain_and_asks_nothing_that_is_judged() -> None:
    judged = {question.prompt for question in text_questions()}
    replayed = conversations("text", "train", 400)
    prompts = Counter(messages[0]["content"] for messages in replayed)
    assert len(prompts) > 250 and judged.isdisjoint(prompts)
    assert all(isinstance(message["content"], str) and message["content"] for row in replayed for message in row)


def test_an_installed_noria_holds_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What setuptools would copy beside the package is all that lies in the folder, and nothing of it is missing."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    build: Any = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # what git tracks does not count: a wheel may be built without it
    copied = {Path(name).name for name in build.find_data_files("noria.scenes", "noria/scenes")}
    assert "noria.scenes" in build.packages
    assert copied == {path.name for path in (root / "noria/scenes/data").iterdir()}
    assert {"digits.csv.gz", "replay.jsonl.gz", "NOTICE.md"} | {f"{name}.jpg" for name in PHOTOS} <= copied
