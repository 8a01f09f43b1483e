"""`noria prefs` on a real store: an export loses nothing, an import may be repeated, a broken line is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image as Picture

from noria.blobs import Blobs
from noria.cli.main import call
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
    assert kinds == ["image", "completion", "preference", "completion", "preference", "preference"]
    capsys.readouterr()
    assert call(["--home", str(copy), "prefs", "import", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 1, "completions": 2, "preferences": 3, "known": 0}
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
    assert json.loads(capsys.readouterr().out) == {"images": 0, "completions": 0, "preferences": 0, "known": 6}
    assert preferences(full) == before


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda lines: [*lines[:2], "{not json", *lines[2:]], 2, "line 3 is not a line of an export"),
        (lambda lines: [lines[0].replace('"data": "', '"data": "AAAA'), *lines[1:]], 6, "line 1: the picture's bytes"),
        (lambda lines: lines[2:], 4, "line 1: chosen.completion_id: no stored completion 'chatcmpl-a'"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 9')], 2, "line 1: format 9"),
    ],
)
def test_a_broken_line_is_named(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, code: int, said: str
) -> None:
    assert callable(spoil)
    file = tmp_path / "p.jsonl"
    call(["--home", str(full), "prefs", "export", str(file)])
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    capsys.readouterr()
    assert call(["--home", str(tmp_path / "new"), "prefs", "import", str(file)]) == code
    assert said in capsys.readouterr().err


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
    assert call(["--home", str(full), "prefs", "forget", "u-9", "--yes", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["completions"], counts["preferences"], counts["images"]) == (3, 3, 1)
    assert preferences(full) == []
    assert not open_blobs(full).exists(sha256)
