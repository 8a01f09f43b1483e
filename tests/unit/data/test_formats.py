"""Rows of every format against the sample that they mean, and the reasons of those that mean none."""

from __future__ import annotations

import base64
import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from noria.errors import InvalidRequest
from noria.records import BLOB_SCHEME, Json
from train.data.formats import RowReader, detect
from train.data.formats.pictures import Place, as_data_url
from train.data.samples import Box, PreferenceSample, Sample, ThumbSample, VisionSample, image_part

HUMAN: Json = {"from": "human", "value": "<image>\nWhat is it?"}
GPT: Json = {"from": "gpt", "value": "a square"}
ASKED: Json = {"role": "user", "content": "What is it?"}
TOLD: Json = {"role": "assistant", "content": "a square"}
TAGGED: Json = {"role": "user", "content": "<image>What is it?"}
SHOWN: Json = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
LINKED: Json = {"role": "user", "content": [image_part("a.png"), {"type": "text", "text": "What is it?"}]}

ONE_PICTURE: dict[str, tuple[str, Json]] = {  # every one of these means the same sample
    "openai": ("openai", {"messages": [LINKED, TOLD]}),
    "ms-swift": ("ms-swift", {"messages": [TAGGED, TOLD], "images": ["a.png"]}),
    "ms-swift without a tag": ("ms-swift", {"messages": [ASKED, TOLD], "images": "a.png"}),
    "ms-swift query": ("ms-swift", {"query": "<image>What is it?", "response": "a square", "images": ["a.png"]}),
    "llama-factory sharegpt": ("llama-factory", {"conversations": [HUMAN, GPT], "images": ["a.png"]}),
    "llama-factory alpaca": (
        "llama-factory",
        {"instruction": "<image>What is it?", "input": "", "output": "a square", "images": ["a.png"]},
    ),
    "trl messages": ("trl", {"messages": [SHOWN, TOLD], "images": ["a.png"]}),
    "trl prompt": ("trl", {"prompt": [SHOWN], "completion": [TOLD], "image": "a.png"}),
    "llava": ("llava", {"id": 1, "image": "a.png", "conversations": [HUMAN, GPT]}),
    "question": ("image-text", {"image": "a.png", "question": "What is it?", "answer": "a square"}),
}
PAIRS: dict[str, tuple[str, Json]] = {  # and these the same pair
    "openai": (
        "openai",
        {
            "input": {"messages": [LINKED]},
            "preferred_output": [TOLD],
            "non_preferred_output": [{"role": "assistant", "content": "a cat"}],
        },
    ),
    "ms-swift": ("ms-swift", {"messages": [TAGGED, TOLD], "images": ["a.png"], "rejected_response": "a cat"}),
    "llama-factory": (
        "llama-factory",
        {
            "conversations": [HUMAN],
            "chosen": GPT,
            "rejected": {"from": "gpt", "value": "a cat"},
            "images": ["a.png"],
        },
    ),
    "llama-factory alpaca": (
        "llama-factory",
        {"instruction": "<image>What is it?", "chosen": "a square", "rejected": "a cat", "images": ["a.png"]},
    ),
    "trl": ("trl", {"prompt": [SHOWN], "chosen": [TOLD], "rejected": "a cat", "images": ["a.png"]}),
    "trl implicit": (
        "trl",
        {
            "chosen": [SHOWN, TOLD],
            "rejected": [SHOWN, {"role": "assistant", "content": "a cat"}],
            "images": [{"path": "a.png"}],
        },
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A file's place with one picture beside it."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return Place("rows.jsonl", str(tmp_path))


def read(row: Any, place: Place, kind: str = "sft", asked: str = "auto") -> list[Any]:
    return list(RowReader(kind, asked).samples(row, place, "rows.jsonl:7"))


def png(colour: str) -> bytes:
    sink = BytesIO()
    Image.new("RGB", (4, 4), colour).save(sink, format="PNG")
    return sink.getvalue()


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_every_format_gives_the_same_sample(name: str, place: Place) -> None:
    asked, row = ONE_PICTURE[name]
    picture = str(Path(str(place.folder)) / "a.png")
    question = {"role": "user", "content": [image_part(picture), {"type": "text", "text": "What is it?"}]}
    wanted = Sample((question, TOLD), (picture,), "rows.jsonl:7")
    assert detect(row) == asked
    assert read(row, place) == [wanted]
    assert read(row, place, asked=asked) == [wanted]


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_gives_the_same_pair(name: str, place: Place) -> None:
    asked, row = PAIRS[name]
    picture = str(Path(str(place.folder)) / "a.png")
    question = {"role": "user", "content": [image_part(picture), {"type": "text", "text": "What is it?"}]}
    assert detect(row) == asked
    assert read(row, place, "dpo") == [
        PreferenceSample((question,), (picture,), "a square", "a cat", "rows.jsonl:7"),
    ]
    assert read(row, place, "sft") == [Sample((question, TOLD), (picture,), "rows.jsonl:7")]


VERDICTS: dict[str, Json] = {  # one answer and what was thought of it: good in every one
    "trl": {"prompt": "What is it?", "completion": "a square", "label": True},
    "ms-swift": {"messages": [ASKED, TOLD], "label": True},
    "llama-factory": {"conversations": [{**HUMAN, "value": "What is it?"}, GPT], "kto_tag": True},
    "ours": {"messages": [ASKED, TOLD], "thumb": "up"},
}


@pytest.mark.parametrize("name", VERDICTS)
def test_one_answer_with_a_verdict(name: str, place: Place) -> None:
    row = VERDICTS[name]
    assert read(row, place, "kto") == [ThumbSample((ASKED,), (), "a square", True, "rows.jsonl:7")]
    key = next(key for key in ("label", "kto_tag", "thumb") if key in row)
    (bad,) = read({**row, key: "down" if key == "thumb" else False}, place, "kto")
    assert (bad.answer, bad.up) == ("a square", False)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_two_answers_with_a_verdict(name: str, place: Place) -> None:
    """What else the row calls a label is not asked."""
    found = read({**PAIRS[name][1], "label": "shapes"}, place, "kto")
    assert [(one.answer, one.up, len(one.images)) for one in found] == [("a square", True, 1), ("a cat", False, 1)]


def test_several_turns_and_pictures_stay_in_order(place: Place) -> None:
    values = ["<image>\nand\n<image>\nwhich is older?", "the first", "sure?\n<image>", "yes"]
    turns = [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]
    names = ["https://x.org/1.png", "s3://b/2.png", as_data_url(png("red"), "image/png")]
    sample = read({"conversations": turns, "image": names}, place)[0]
    assert sample.images == tuple(names)
    words = {"type": "text", "text": "and"}
    older = {"type": "text", "text": "which is older?"}
    assert sample.messages[0]["content"] == [image_part(names[0]), words, image_part(names[1]), older]
    assert sample.messages[2]["content"] == [{"type": "text", "text": "sure?"}, image_part(names[2])]
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] * 2


def test_a_rejected_answer_each_makes_a_pair(place: Place) -> None:
    row = {"messages": [ASKED, TOLD], "rejected_response": ["a cat", "a dog"]}
    assert [pair.rejected for pair in read(row, place, "dpo")] == ["a cat", "a dog"]
    assert len(read(row, place, "sft")) == 1


def test_a_system_message_comes_first_and_roles_are_translated(place: Place) -> None:
    row = {"system": "Be brief.", "conversations": [{**HUMAN, "value": "hi"}, GPT], "images": []}
    assert [turn["role"] for turn in read(row, place)[0].messages] == ["system", "user", "assistant"]
    row = {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, TOLD]}
    assert read(row, place)[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_a_caption_has_the_picture_alone_as_its_prompt(place: Place) -> None:
    picture = str(Path(str(place.folder)) / "a.png")
    sample = read({"image": "a.png", "text": "a red square"}, place, "align")[0]
    assert sample.messages == (
        {"role": "user", "content": [image_part(picture)]},
        {"role": "assistant", "content": "a red square"},
    )


def test_labels_and_boxes(place: Place) -> None:
    picture = str(Path(str(place.folder)) / "a.png")
    row: Json = {"image": "a.png", "labels": {"colour": "red", "count": 2, "digit": None}}
    row["objects"] = [{"label": "square", "box": [0, 0.5, 0.5, 1]}]
    wanted = VisionSample(
        picture, {"colour": "red", "count": "2"}, (Box("square", 0.0, 0.5, 0.5, 1.0),), "rows.jsonl:7"
    )
    assert read(row, place, "vision") == [wanted]
    row["objects"] = [{"label": "square", "bbox": [0, 20, 50, 40]}]
    assert read({**row, "width": 100, "height": 40}, place, "vision") == [wanted]


def test_embedded_pictures_are_kept_once_and_named(place: Place) -> None:
    kept: dict[str, bytes] = {}

    def keep(data: bytes, media_type: str) -> str:
        assert media_type == "image/png"
        kept[hashlib.sha256(data).hexdigest()] = data
        return hashlib.sha256(data).hexdigest()

    here = Place("set[train]", None, keep)
    data = png("blue")
    digest = hashlib.sha256(data).hexdigest()
    coded = base64.b64encode(data).decode()
    for value in (data, {"bytes": data, "path": None}, {"base64": coded}, Image.open(BytesIO(data))):
        sample = read({"messages": [TAGGED, TOLD], "images": [value]}, here)[0]
        assert sample.images[0] in kept
    assert kept[digest] == data
    assert read({"messages": [TAGGED, TOLD], "images": [data]}, place)[0].images == (f"data:image/png;base64,{coded}",)


def test_our_export_gives_pairs_with_their_pictures_and_cuts(place: Place) -> None:
    data = png("green")
    digest = hashlib.sha256(data).hexdigest()
    reader = RowReader("dpo")
    picture: Json = {"kind": "image", "format": 1, "sha256": digest, "media_type": "image/png"}
    picture["data"] = base64.b64encode(data).decode()
    completion = {"kind": "completion", "format": 1, "id": "c1"}
    completion["choices"] = [{"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": "length"}]
    shown = {"role": "user", "content": [image_part(BLOB_SCHEME + digest)]}
    preference: Json = {"kind": "preference", "format": 1, "id": "p1", "verdict": "chosen"}
    preference["chosen"], preference["rejected"] = ({"completion_id": "c1", "index": n} for n in (0, 1))
    preference["pair"] = {"messages": [shown], "chosen_text": "a square", "rejected_text": "a ca"}
    assert reader.samples(picture, place, "f:1") == reader.samples(completion, place, "f:2") == []
    (pair,) = reader.samples(preference, place, "f:3")
    assert isinstance(pair, PreferenceSample)
    assert pair.images == (f"data:image/png;base64,{picture['data']}",)
    assert (pair.chosen, pair.chosen_cut, pair.rejected, pair.rejected_cut) == ("a square", False, "a ca", True)
    (Path(place.folder or ".") / "own.png").write_bytes(data)
    for named in ("https://x.org/a.png", "own.png"):
        preference["pair"]["messages"] = [{"role": "user", "content": [image_part(named)]}]
        with pytest.raises(InvalidRequest, match="a picture that was not stored"):
            reader.samples(preference, place, "f:4")
    assert reader.samples({**preference, "verdict": "tie"}, place, "f:4") == []
    with pytest.raises(InvalidRequest, match="the line says"):
        reader.samples({**picture, "sha256": "0" * 64}, place, "f:5")


BAD: dict[str, tuple[Any, str, str]] = {
    "not an object": ([1], "sft", "not an object"),
    "unknown keys": ({"foo": 1, "bar": 2}, "sft", "bar, foo"),
    "no answer": ({"messages": [ASKED]}, "sft", "last message is not the assistant's"),
    "blank answer": ({"messages": [ASKED, {**TOLD, "content": " "}]}, "sft", "blank"),
    "nobody asked": ({"messages": [TOLD]}, "sft", "no user's message"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}, TOLD]}, "sft", "role 'robot'"),
    "no content": ({"messages": [{"role": "user"}, TOLD]}, "sft", "no 'content'"),
    "messages are text": ({"messages": "hello"}, "sft", "not a list"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, TOLD]}, "sft", "'audio' part"),
    "tags without pictures": ({"messages": [TAGGED, TOLD]}, "sft", "more pictures than the row has"),
    "picture missing": ({"messages": [TAGGED, TOLD], "images": ["b.png"]}, "sft", "'b.png' is not there"),
    "picture is a number": ({"messages": [TAGGED, TOLD], "images": [3]}, "sft", "int 3"),
    "picture is no picture": ({"messages": [TAGGED, TOLD], "images": [{"bytes": b"xx"}]}, "sft", "cannot be read"),
    "picture in an answer": (
        {"messages": [ASKED, {**SHOWN, "role": "assistant"}], "images": ["a.png"]},
        "sft",
        "picture",
    ),
    "no rejected": ({"messages": [ASKED, TOLD]}, "dpo", "no rejected answer"),
    "no verdict": ({"messages": [ASKED, TOLD]}, "kto", "one answer and no verdict"),
    "a verdict of neither": ({"messages": [ASKED, TOLD], "label": "maybe"}, "kto", "'label' is 'maybe', not True or"),
    "a verdict in a list": ({"messages": [ASKED, TOLD], "thumb": ["up"]}, "kto", "'thumb' is"),
    "same twice": ({"messages": [ASKED, TOLD], "rejected_response": "a square "}, "dpo", "the same"),
    "one side": ({"prompt": "q", "chosen": "a", "rejected": None, "completion": None}, "dpo", "fits no known format"),
    "texts without a prompt": ({"chosen": "a", "rejected": "b"}, "dpo", "no prompt"),
    "conversation for the tower": ({"messages": [ASKED, TOLD]}, "vision", "cannot be used by a 'vision' stage"),
    "labels for words": ({"image": "a.png", "labels": {"a": "b"}}, "sft", "cannot be used by a 'sft' stage"),
    "box outside": (
        {"image": "a.png", "objects": [{"label": "x", "box": [0, 0, 20, 20]}]},
        "vision",
        "not within the picture",
    ),
    "box of three": ({"image": "a.png", "objects": [{"label": "x", "box": [0, 0, 1]}]}, "vision", "x0, y0, x1, y1"),
    "no labels": ({"image": "a.png", "labels": {}}, "vision", "neither labels nor objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_why(name: str, place: Place) -> None:
    row, kind, reason = BAD[name]
    with pytest.raises(InvalidRequest, match=reason):
        read(row, place, kind)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"'parquet' is none of auto, noria, openai"):
        RowReader("sft", "parquet")


def test_rows_from_elsewhere_name_no_file_of_this_machine(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"messages": [TAGGED, TOLD], "images": [str(tmp_path / "a.png")]}
    far = Place("https://x.org/d/rows.jsonl", "https://x.org/d")
    assert read(row, far)[0].images == (f"https://x.org/d{tmp_path}/a.png",)
    assert read({**row, "images": ["../p/a.png"]}, far)[0].images == ("https://x.org/d/../p/a.png",)
    for place in (far, Place("set[train]", None)):
        for scheme in ("file", "local"):
            with pytest.raises(InvalidRequest, match="may not name"):
                read({**row, "images": [f"{scheme}://{tmp_path}/a.png"]}, place)
