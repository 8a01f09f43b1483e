"""Where a checkpoint comes from, and what the home holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from noria.cli.main import call
from noria.cli.models import fetched, name_of
from noria.errors import NotFound, Unavailable


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetched("org/name") == tmp_path / "org" / "name"
    assert name_of("org/name/") == "name"
    assert name_of("llava-hf/llava-1.5-7b-hf") == "llava-1.5-7b-hf"


@pytest.mark.parametrize("source", ["/models/none", "./none", "none", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_not_found(source: str) -> None:
    with pytest.raises(NotFound, match="neither a folder nor a hub id"):
        fetched(source)


def test_a_download_that_fails_is_unavailable_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable) as raised:
        fetched("noria-tests/no-such-model")
    assert raised.value.message.startswith("noria-tests/no-such-model could not be downloaded: ")
    assert "\n" not in raised.value.message


def test_the_masters_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, config in (("llava", '{"model_type": "llava"}'), (".llava-staging", "{}"), ("broken", "{")):
        (tmp_path / "masters" / name).mkdir(parents=True)
        (tmp_path / "masters" / name / "config.json").write_text(config)
    assert call(["--home", str(tmp_path), "model", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["model_type"], one["bytes"]) for one in found] == [
        ("broken", None, 1),
        ("llava", "llava", 23),
    ]
    assert call(["--home", str(tmp_path), "model", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["llava", "llava", "0.00", "GiB"]
