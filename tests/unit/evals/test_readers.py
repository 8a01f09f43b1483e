"""Readers of published formats, each on a small file in that format."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from noria.demo.questions import held_out, training
from noria.errors import InvalidRequest, NotFound
from noria.evals.questions import Question, content_of
from noria.evals.sets import load_set
from noria.records import Json
from noria.settings import ImageSettings
from serve.input.pictures.admit import admit
from tests.unit.evals.files import cell, mme, mmmu_row, parquet, png, textvqa, textvqa_row, write, write_lines

DATA = "data:image/png;base64," + base64.b64encode(png()).decode()


def parts_of(question: Question) -> list[Json]:
    """The content of a question with pictures."""
    content = content_of(question)
    assert isinstance(content, list)
    return content


def test_jsonl_takes_every_key_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    write(tmp_path / "pictures" / "a.png", png())
    rows: list[Any] = [
        {"question": "Which colour?", "image": "pictures/a.png", "answer": "red", "category": "colour", "id": "one"},
        {"question": "Which?", "options": ["cat", "dog"], "answer": "dog"},
        {"question": "Which?", "options": ["cat", "dog"], "answer": 0},
        {"question": "Both?", "images": ["pictures/a.png", DATA], "answers": ["yes"], "metric": "yes_no", "group": 7},
        {"question": "How much?", "answer": 3.5, "metric": "number", "tolerance": 0.1},
        "{not json",
        {"question": "Which?", "answer": "x", "metrc": "exact"},
        {"question": "Where?", "image": "gone.png", "answer": "x"},
        {"question": "Where?", "image": "questions.jsonl", "answer": "x"},
        {"question": "", "answer": "x"},
        {"question": "Which?", "answers": []},
        {"question": "Which?", "answer": "x", "answers": ["y"]},
        {"question": "Which?", "options": ["cat", "dog"], "answer": "cow"},
        {"question": "How many?", "answer": "some", "metric": "number"},
        {"question": "Is it?", "answer": "maybe", "metric": "yes_no"},
        {"question": "Which?", "answer": "x", "metric": "bleu"},
        {"question": "Which?", "answer": "x", "metric": "choice"},
        "[1]",
    ]
    found = load_set(str(write_lines(tmp_path / "questions.jsonl", rows)))
    assert [one.metric for one in found.questions] == ["exact", "choice", "choice", "yes_no", "number"]
    assert [one.answers for one in found.questions] == [("red",), ("B",), ("A",), ("yes",), ("3.5",)]
    assert [len(one.pictures) for one in found.questions] == [1, 0, 0, 2, 0]
    assert (found.questions[0].id, found.questions[0].category, found.questions[3].group) == ("one", "colour", "7")
    asked = "Which?\n(A) cat\n(B) dog\n\nAnswer with the option's letter from the given choices directly."
    assert found.questions[1].prompt == asked
    said = {row.line: row.reason for row in found.bad}
    assert sorted(said) == list(range(6, 19))
    assert {row.file for row in found.bad} == {str(tmp_path / "questions.jsonl")}
    for line, part in {
        6: "not JSON",
        7: "unknown key 'metrc'",
        8: "gone.png is not there",
        9: "questions.jsonl",
        10: "no 'question'",
        11: "'answers' must be",
        12: "one of 'answer' and 'answers'",
        13: "'cow' is none of the 2 options",
        14: "holds no number",
        15: "neither yes nor no",
        16: "'bleu' is none of",
        17: "go together",
        18: "not a JSON object",
    }.items():
        assert part in said[line], line


def test_rows_without_a_metric_take_the_one_that_was_said(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question": "Who?", "answer": "me"}])
    assert load_set(str(file), metric="anls").questions[0].metric == "anls"


def test_the_hash_follows_everything_that_is_shown_or_judged(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png("red"))

    def hashed(row: dict[str, Any], name: str = "q.jsonl") -> str:
        return load_set(str(write_lines(tmp_path / name, [row]))).hash

    row = {"question": "Which colour?", "image": "a.png", "answer": "red"}
    first = hashed(row)
    assert first.startswith("sha256:")
    assert hashed(row, "other-name.jsonl") == first
    assert hashed({**row, "id": "named"}) == first
    for change in ({"question": "Which?"}, {"answer": "green"}, {"metric": "contains"}, {"category": "c"}):
        assert hashed({**row, **change}) != first, change
    write(tmp_path / "a.png", png("blue"))
    assert hashed(row) != first


def test_pictures_come_first_or_where_the_text_shows_them(tmp_path: Path) -> None:
    rows = [
        {"question": "Plain.", "answer": "x"},
        {"question": "What is it?", "image": DATA, "answer": "x"},
        {"question": "Is <image 2> like <image 1>, or not <image 2>?", "images": [DATA, DATA], "answer": "x"},
        {"question": "After <image 2> look.", "images": [DATA, DATA], "answer": "x"},
    ]
    plain, before, inside, mixed = load_set(str(write_lines(tmp_path / "q.jsonl", rows))).questions
    assert content_of(plain) == "Plain."
    assert content_of(before) == [
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "text", "text": "What is it?"},
    ]
    kinds = [part["text"] if part["type"] == "text" else part["type"] for part in parts_of(inside)]
    assert kinds == ["Is", "image_url", "like", "image_url", ", or not <image 2>?"]
    assert [part["type"] for part in parts_of(mixed)] == ["image_url", "text", "image_url", "text"]


def test_pictures_come_from_urls_and_are_made_by_their_reference(tmp_path: Path, web: str) -> None:
    write(tmp_path / "far.png", png("green"))
    rows = [
        {"question": "Far?", "image": f"{web}/far.png", "answer": "x"},
        {"question": "Gone?", "image": f"{web}/gone.png", "answer": "x"},
        {"question": "Nowhere?", "image": "nosuch://bucket/a.png", "answer": "x"},
        {"question": "Drawn?", "image": "scene:held_out/one/1/2", "answer": "x"},
        {"question": "Drawn?", "image": "scene:nothing", "answer": "x"},
        {"question": "Broken?", "image": "data:image/png;base64,@@@@", "answer": "x"},
    ]
    found = load_set(str(write_lines(tmp_path / "q.jsonl", rows)))
    far, drawn = found.questions
    assert far.pictures[0].read() == png("green")
    (tmp_path / "far.png").unlink()
    assert far.pictures[0].read() == png("green")  # fetched once
    assert drawn.pictures[0].read()[:2] == b"BM"
    assert [row.line for row in found.bad] == [2, 3, 5, 6]
    reasons = [row.reason for row in found.bad]
    for part, reason in zip(
        ("cannot be fetched", "cannot be fetched", "scene:nothing", "base64"), reasons, strict=True
    ):
        assert part in reason


def test_what_is_asked_passes_the_servers_door_as_it_is_by_default(tmp_path: Path) -> None:
    """Whatever the file was: made pictures are hashed as BMP, scans come as TIFF and in four colours."""
    scan = Image.new("CMYK", (40, 30), (0, 255, 255, 0))
    files = {"a.bmp": scan.convert("RGB"), "a.tiff": scan, "a.gif": scan.convert("P"), "a.png": scan.convert("RGB")}
    for name, picture in files.items():
        picture.save(tmp_path / name)
    rows = [{"question": "Red?", "image": name, "answer": "yes"} for name in [*files, "scene:held_out/one/1/2"]]
    asked = [*load_set(str(write_lines(tmp_path / "q.jsonl", rows))).questions, *held_out(), *training()]
    shown = [(question, part) for question in asked if question.pictures for part in parts_of(question)]
    kinds = set()
    for question, part in shown:
        if part["type"] != "image_url":
            continue
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        admitted = admit(data, ImageSettings())
        kinds.add(admitted.media_type)
        assert pixels(admitted.data) == pixels(question.pictures[0].read()), question.pictures[0].ref
    assert kinds == {"image/png", "image/gif"}


def pixels(data: bytes) -> bytes:
    """The picture's pixels in RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server over the test's folder."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_textvqa_as_published(tmp_path: Path) -> None:
    ten = ["stop"] * 7 + ["Stop sign", "stop sign", "halt"]
    file = textvqa(
        tmp_path,
        [
            textvqa_row(1, "003a8ae2ef43b901", ten),
            textvqa_row(2, "not-there", ten),
            textvqa_row(3, "003a8ae2ef43b901", ten[:9]),
            {key: value for key, value in textvqa_row(4, "003a8ae2ef43b901", ten).items() if key != "answers"},
        ],
    )
    found = load_set(str(file))
    (one,) = found.questions
    assert one.prompt == "what is written 1?\nAnswer the question using a single word or phrase."
    assert (one.metric, one.answers, one.id, len(one.pictures)) == ("vqa", tuple(ten), "34601", 1)
    assert [(row.line, row.reason.split()[0]) for row in found.bad] == [(2, "picture"), (3, "9"), (4, "no")]


def test_textvqa_from_the_hub_s_parquet(tmp_path: Path) -> None:
    row = {key: value for key, value in textvqa_row(1, "x", ["a"] * 10).items() if key != "flickr_original_url"}
    file = parquet(tmp_path / "validation-00000.parquet", [{**row, "image": cell("red")}])
    found = load_set(str(file))
    assert found.questions[0].pictures[0].read() == png("red")
    assert found.questions[0].metric == "vqa"


def test_a_json_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no list under 'data'"):
        load_set(str(write(tmp_path / "x.json", b"{}")))
    with pytest.raises(InvalidRequest, match="not JSON"):
        load_set(str(write(tmp_path / "x.json", b"{")))


def test_mme_as_released_in_both_layouts(tmp_path: Path) -> None:
    found = load_set(str(mme(tmp_path / "MME")))
    assert found.name == "MME"
    assert [(one.category, one.answers[0]) for one in found.questions] == [
        ("existence", "yes"),
        ("existence", "no"),
        ("landmark", "yes"),
    ]
    assert found.questions[0].group == found.questions[1].group != found.questions[2].group
    assert found.questions[0].prompt == "Is there a train in this image? Please answer yes or no."
    said = [(Path(row.file).name, row.line, row.reason) for row in found.bad]
    assert [(name, line) for name, line, _ in said] == [("0a1b.txt", 2), ("gone.txt", 1), ("gone.txt", 2)]
    assert "'Perhaps' is neither" in said[0][2]
    assert "gone.jpg or .png is not in" in said[1][2]
    assert "no TAB" in said[2][2]


def test_mme_from_the_hub_s_parquet(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": "count/1.png",
            "image": cell("red"),
            "question": f"Is it {n}?",
            "answer": a,
            "category": "count",
        }
        for n, a in ((1, "Yes"), (2, "No"))
    ]
    found = load_set(str(parquet(tmp_path / "test.parquet", rows)))
    assert [one.answers for one in found.questions] == [("yes",), ("no",)]
    assert {one.group for one in found.questions} == {"count/count/1.png"}


def test_mmmu_from_parquet_with_pictures_inside_the_text(tmp_path: Path) -> None:
    rows = [
        mmmu_row("validation_Accounting_1", image_1=cell("red"), image_2=cell("blue")),
        mmmu_row("validation_Art_Theory_2", question="<image 1> How much?", options="[]", question_type="open",
                 answer="['3.43', '343%']", image_1=cell("green")),
        mmmu_row("validation_Art_Theory_3", question="Who?", options="[]", question_type="open", answer="Monet",
                 image_1=cell("green")),
        mmmu_row("test_Art_4", answer="?", image_1=cell("red"), image_2=cell("blue")),
        mmmu_row("validation_Art_5", image_1=cell("red")),
        mmmu_row("validation_Art_6", image_2=cell("red")),
        mmmu_row("validation_Art_7", options="['a', ", image_1=cell("red"), image_2=cell("blue")),
    ]  # fmt: skip
    found = load_set(str(parquet(tmp_path / "Accounting" / "validation-00000.parquet", rows)))
    choice, number, word = found.questions
    assert (choice.metric, choice.answers, choice.category) == ("choice", ("B",), "Accounting")
    assert [part["type"] for part in parts_of(choice)] == ["image_url", "text", "image_url", "text"]
    assert choice.pictures[1].read() == png("blue")
    assert choice.prompt.splitlines()[1:3] == ["(A) the first", "(B) the second"]
    assert (number.metric, number.answers, number.tolerance) == ("number", ("3.43", "343%"), 0.005)
    assert (word.metric, word.answers, word.category) == ("contains", ("Monet",), "Art_Theory")
    assert len(word.pictures) == 1  # never named in the text: shown before it
    reasons = {row.line: row.reason for row in found.bad}
    assert sorted(reasons) == [4, 5, 6, 7]
    assert "without answers" in reasons[4]
    assert "<image 2>" in reasons[5]
    assert "image_1 is missing" in reasons[6]
    assert "'options' is no list" in reasons[7]


def test_mmmu_from_a_folder_of_jsonl_with_lists_and_paths(tmp_path: Path) -> None:
    for subject, colour in (("Art", "red"), ("Music", "blue")):
        write(tmp_path / subject / "1.png", png(colour))
        row = mmmu_row(f"validation_{subject}_1", question="<image 1>?", options=["x", "y"], image_1="1.png")
        write_lines(tmp_path / subject / "validation.jsonl", [row])
    found = load_set(f"mmmu:{tmp_path}")
    assert [one.category for one in found.questions] == ["Art", "Music"]
    assert [one.pictures[0].read() for one in found.questions] == [png("red"), png("blue")]
    assert load_set(str(tmp_path)).hash == found.hash


def test_named_sets_are_fixed(tmp_path: Path) -> None:
    text = load_set("embedded-text")
    assert (len(text.questions), len({one.prompt for one in text.questions})) == (40, 40)
    assert {one.metric for one in text.questions} == {"contains"}
    drawn = load_set("embedded", limit=8)
    assert [one.id for one in drawn.questions] == [
        *("colour-1", "colour-2", "shape-1", "shape-2", "count-1", "left/right-1", "digit-1", "handwriting-1")
    ], "categories in turn"
    assert drawn.hash == load_set("embedded", limit=8).hash
    assert all(len(one.pictures) == 1 for one in drawn.questions)


def test_the_embedded_set_asks_each_kind_as_often() -> None:
    from collections import Counter

    from noria.evals.named.embedded import EACH, embedded_questions

    questions = embedded_questions()
    assert set(Counter(one.category for one in questions).values()) == {EACH}
    assert {"colour", "shape", "count", "left/right", "digit"} <= {one.category for one in questions}
    assert len({one.id for one in questions}) == len(questions)


def test_names_and_files_that_are_no_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no set and no file is called 'embeded'"):
        load_set("embeded")
    with pytest.raises(InvalidRequest, match=r"a \.jsonl, \.json or \.parquet file"):
        load_set(str(write(tmp_path / "x.csv", b"a,b")))
    with pytest.raises(InvalidRequest, match="not a parquet file"):
        load_set(str(write(tmp_path / "x.parquet", b"PAR")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"neither \.jsonl"):
        load_set(str(tmp_path / "empty"))
    with pytest.raises(InvalidRequest, match=r"holds no question that can be asked: .*bad.jsonl:1: not JSON"):
        load_set(str(write(tmp_path / "bad.jsonl", b"x\n")))
