"""`noria prefs` on a real store: an export loses nothing, an import may be repeated, a broken line is named."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from noria.blobs import Blobs
from noria.cli.main import call
from noria.cli.prefs.framing import framed
from noria.errors import Unavailable
from noria.records import BLOB_SCHEME, Choice, Completion, Preference, Side
from noria.store import Store


def open_store(home: Path) -> Store:
    home.mkdir(exist_ok=True)
    return Store.open(f"sqlite:///{home / 'noria.db'}")


def open_blobs(home: Path) -> Blobs:
    return Blobs(f"file://{home / 'blobs'}")


def png(colour: str) -> bytes:
    data = io.BytesIO()
    Picture.new("RGB", (4, 3), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A home with two completions over one picture, three preferences, and one completion nobody judged."""
    home = tmp_path / "full"
    image = open_blobs_of(home).put(png("red"), "image/png")
    with open_store(home) as store:
        store.add_completions([completion(name, image) for name in ("chatcmpl-a", "chatcmpl-b", "chatcmpl-c")])
        store.add_preference(Side("chatcmpl-a", 0), Side("chatcmpl-a", 1), annotator="u-1", comment="ünder")
        store.add_preference(Side("chatcmpl-a", 1), Side("chatcmpl-b", 0), "tie", annotator="u-2")
        store.add_feedback("chatcmpl-a", 0, edit="An edit.", annotator="u-1")
    return home


def open_blobs_of(home: Path) -> Blobs:
    home.mkdir(exist_ok=True)
    return open_blobs(home)


def completion(name: str, image: object) -> Completion:
    from noria.records import Image

    assert isinstance(image, Image)
    shown = {"type": "image_url", "image_url": {"url": BLOB_SCHEME + image.sha256}}
    return Completion(
        id=name,
        created_at=1000.25,
        model="noria",
        model_version="v1",
        messages=({"role": "user", "content": [{"type": "text", "text": "What colour?"}, shown]},),
        params={"n": 2, "temperature": 0.8},
        prompt_hash="hash",
        choices=tuple(answer(index, f"{name} says {index}") for index in range(2)),
        images=(image,),
        prompt_token_ids=(1, 2, 3),
        end_user="u-9",
        metadata={"k": "v"},
        usage={"total_tokens": 5},
        system_fingerprint="v1-1a2b3c4d",
        ttft_s=0.1,
        duration_s=0.5,
    )


def answer(index: int, text: str) -> Choice:
    message = {"role": "assistant", "content": text}
    return Choice(index, text, message, token_ids=(4, 5), logprobs=(-0.5, -1.25), finish_reason="stop")


def preferences(home: Path) -> list[Preference]:
    with open_store(home) as store:
        return list(store.iter_preferences())


def test_an_export_loses_nothing(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, copy = tmp_path / "p.jsonl", tmp_path / "copy"
    assert call(["--home", str(full), "prefs", "export", str(file)]) == 0
    kinds = [json.loads(line)["kind"] for line in file.read_text().splitlines()]
    middle = ["image", "completion", "preference", "completion", "preference", "preference", "feedback"]
    assert kinds == ["header", *middle, "end"]
    capsys.readouterr()
    assert call(["--home", str(copy), "prefs", "import", str(file), "--json"]) == 0
    taken = {"images": 1, "completions": 2, "preferences": 3, "feedback": 1, "known": 0}
    assert json.loads(capsys.readouterr().out) == taken
    assert preferences(copy) == preferences(full)
    with open_store(full) as old, open_store(copy) as new:
        for name in ("chatcmpl-a", "chatcmpl-b"):
            assert new.get_completion(name) == old.get_completion(name)
        assert new.count_completions() == 2
        assert [pair for _, pair in new.training_pairs()] == [pair for _, pair in old.training_pairs()]
        sha256 = old.get_completion("chatcmpl-a").images[0].sha256
    assert open_blobs(copy).get(sha256) == png("red")


def test_a_line_can_be_read_without_noria(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--home", str(full), "prefs", "export", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    edit = next(line for line in lines if line.get("source") == "edit")
    assert edit["pair"]["chosen_text"] == "An edit."
    assert edit["pair"]["rejected_text"] == "chatcmpl-a says 0"
    assert edit["pair"]["messages"][0]["content"][0]["text"] == "What colour?"


def test_importing_twice_changes_nothing(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    call(["--home", str(full), "prefs", "export", str(file)])
    before = preferences(full)
    capsys.readouterr()
    assert call(["--home", str(full), "prefs", "import", str(file), "--json"]) == 0
    none = {"images": 0, "completions": 0, "preferences": 0, "feedback": 0, "known": 7}
    assert json.loads(capsys.readouterr().out) == none
    assert preferences(full) == before


def sealed(lines: list[str]) -> list[str]:
    """The lines between, in a frame of their own."""
    return [line.decode().rstrip("\n") for line in framed({}, (json.loads(line) for line in lines[1:-1]))]


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda lines: lines[:-1], 6, "the file has no end after line 8: it was cut off"),
        (lambda lines: [*lines[:3], *lines[4:]], 6, "line 8: the end says 7 lines, there are 6"),
        (
            lambda lines: [*lines[:3], lines[3].replace('"ties"', "0") + " ", *lines[4:]],
            6,
            "line 9: the lines have sha256",
        ),
        (lambda lines: [*lines[:2], "{not json", *lines[2:]], 6, "line 10: the end says 7 lines, there are 8"),
        (lambda lines: [lines[0].replace('"format":2', '"format":3')], 2, "format 3 was written by a newer Noria"),
        (lambda lines: [lines[0], *lines], 6, "line 2: a header, and the file before it has no end"),
        (
            lambda lines: sealed([lines[0], lines[1].replace('"data":"', '"data":"AAAA'), *lines[2:]]),
            *(6, "line 2: the picture's bytes"),
        ),
        (
            lambda lines: sealed([lines[0], *lines[3:]]),
            *(4, "line 2: chosen.completion_id: no stored completion 'chatcmpl-a'"),
        ),
        (lambda lines: sealed([lines[0], lines[2], *lines[2:]]), 5, "line 2: a picture was deleted"),
        (lambda lines: ['{"kind": "preference", "format": 9}'], 2, "line 1: format 9: a line without a header"),
        (
            lambda lines: sealed([*lines[:2], lines[2].replace(":1000.25", ':"x"'), *lines[3:]]),
            *(2, "line 3 is not a line of an export: could not convert string to float"),
        ),
        (
            lambda lines: sealed([*lines[:2], lines[2].replace('{"total_tokens":5}', "null"), *lines[3:]]),
            *(2, "line 3 is not a line of an export: NOT NULL constraint failed"),
        ),
        (lambda lines: ["[1]"], 2, "line 1 is not a line of an export: it is no object"),
    ],
)
def test_a_broken_file_is_refused_and_its_line_named(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, code: int, said: str
) -> None:
    assert callable(spoil)
    file = tmp_path / "p.jsonl"
    call(["--home", str(full), "prefs", "export", str(file)])
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    capsys.readouterr()
    assert call(["--home", str(tmp_path / "new"), "prefs", "import", str(file)]) == code
    assert said in capsys.readouterr().err
    assert preferences(tmp_path / "new") == []


def test_a_file_of_the_first_format_is_read(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It had no header and no end; each of its lines names the format."""
    file, old, copy = tmp_path / "p.jsonl", tmp_path / "old.jsonl", tmp_path / "copy"
    call(["--home", str(full), "prefs", "export", str(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    old.write_text("".join(json.dumps({**one, "format": 1}) + "\n" for one in lines[1:-2]))
    assert call(["--home", str(copy), "prefs", "import", str(old)]) == 0
    assert preferences(copy) == preferences(full)
    capsys.readouterr()
    assert call(["--home", str(copy), "prefs", "import", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["feedback"] == 1


def test_an_interrupted_import_goes_on(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, copy, again = tmp_path / "p.jsonl", tmp_path / "copy", tmp_path / "again.jsonl"
    call(["--home", str(full), "prefs", "export", str(file)])
    monkeypatch.setattr(Store, "import_feedback", lambda *_: (_ for _ in ()).throw(Unavailable("the disk is full")))
    assert call(["--home", str(copy), "prefs", "import", str(file)]) == 7
    monkeypatch.undo()
    assert call(["--home", str(copy), "prefs", "import", str(file)]) == 0
    assert call(["--home", str(copy), "prefs", "export", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes()


WEIRD = st.text(st.characters(), max_size=40).filter(lambda text: bool(text.strip()))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=WEIRD, first=WEIRD, comment=WEIRD, edit=WEIRD, key=WEIRD)
@example("\ud800\x00", '\r\n\u2028{"kind":"end"', "\x1b[2J", "\x85\udfff", "\x00")
def test_an_export_of_any_text_comes_back_byte_for_byte(
    asked: str, first: str, comment: str, edit: str, key: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        made = replace(
            completion("c", open_blobs_of(one).put(png("red"), "image/png")),
            messages=({"role": "user", "content": asked, key: [asked]},),
            choices=(answer(0, first), answer(1, first + "!")),
            metadata={key: asked},
        )
        with open_store(one) as store:
            store.add_completions([made])
            store.add_preference(Side("c", 0), Side("c", 1), "tie", annotator=comment, comment=comment)
            store.add_feedback("c", 0, edit=edit + "?", comment=comment)
        for home, name in ((one, "1"), (two, "2")):
            assert call(["--home", str(home), "prefs", "export", f"{folder}/{name}"]) == 0
            assert call(["--home", str(two), "prefs", "import", f"{folder}/1"]) == 0
        assert Path(folder, "1").read_bytes() == Path(folder, "2").read_bytes()


def test_what_people_wrote_does_not_move_the_cursor(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor the window's title, nor make a line that looks like ours."""
    hostile = "\x1b]0;owned\x07\x1b[2Jme\n pref_0  \x9b31m\u202etxt\ud800"
    with open_store(full) as store:
        store.add_preference(Side("chatcmpl-c", 0), Side("chatcmpl-c", 1), annotator=hostile)
    for words in (["list"], ["stats"], ["list", "--json"], ["stats", "--json"]):
        capsys.readouterr()
        assert call(["--home", str(full), "prefs", *words]) == 0
        out = capsys.readouterr().out
        assert not [char for char in out if not (char.isprintable() or char == "\n")]
        assert "owned" in out
    assert json.loads(out)["annotators"][hostile.replace("\ud800", "\ufffd")] == 1
    capsys.readouterr()
    call(["--home", str(full), "prefs", "list"])
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_failed_export_leaves_no_file(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(full) as store:
        open_blobs(full).delete(store.get_completion("chatcmpl-a").images[0].sha256)
    file = tmp_path / "p.jsonl"
    assert call(["--home", str(full), "prefs", "export", str(file)]) == 4
    assert list(tmp_path.glob("*p.jsonl*")) == []
    capsys.readouterr()


def test_an_export_into_no_folder_says_so(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--home", str(full), "prefs", "export", str(tmp_path / "none" / "x.jsonl")]) == 2
    assert capsys.readouterr().err.endswith("x.jsonl: No such file or directory\n")


def test_stats_and_list(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--home", str(full), "prefs", "stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "total": 3,
        "unused": 2,
        "verdicts": {"chosen": 2, "tie": 1},
        "sources": {"preference": 2, "edit": 1},
        "annotators": {"u-1": 2, "u-2": 1},
    }
    assert call(["--home", str(full), "prefs", "stats"]) == 0
    assert "annotators  2: u-1 2, u-2 1" in capsys.readouterr().out
    assert call(["--home", str(full), "prefs", "list", "--annotator", "u-2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2
    assert rows[1].split()[3:] == ["tie", "chatcmpl-a#1", "chatcmpl-b#0", "u-2", "preference"]


def test_forget_deletes_all_of_one_end_user(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(full) as store:
        sha256 = store.get_completion("chatcmpl-a").images[0].sha256
    assert call(["--home", str(full), "prefs", "forget", "--yes"]) == 2
    assert call(["--home", str(full), "prefs", "forget", "u-8", "--user", "u-9", "--yes"]) == 2
    capsys.readouterr()
    assert call(["--home", str(full), "prefs", "forget", "u-9", "--yes", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["completions"], counts["preferences"], counts["images"]) == (3, 3, 1)
    assert preferences(full) == []
    assert not open_blobs(full).exists(sha256)
