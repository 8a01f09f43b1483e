"""`noria keys` and `noria audit`: straight on the home's store, a key's text shown once and kept nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from noria.access.audit import os_user
from noria.access.keys import TEXT, hash_of
from noria.cli.main import call
from noria.cli.up.command import with_trainer_key
from noria.settings import Settings, load_settings
from noria.store import Store
from tests.unit.fake_server import page, serving
from train.methods.grpo.sampling.servers import key_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line on an empty home; gives exit status, output, errors."""
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))
    for name in ("NORIA_URL", "NORIA_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = call(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_key_is_printed_once_and_alone(run: Run, tmp_path: Path) -> None:
    code, text, said = run("keys", "create", "shop", "--role", "client", "--role", "annotator")
    assert code == 0 and TEXT.fullmatch(text.strip())
    assert "first key" in said and "not shown again" in said and text.strip() not in said
    code, told, said = run("keys", "create", "boss", "--role", "operator", "--expires-days", "1", "--json")
    made = json.loads(told)
    assert (code, made["roles"], made["state"], said) == (0, ["operator"], "valid", "")
    assert made["expires_at"] == pytest.approx(made["created_at"] + 86_400, abs=5)
    code, told, _ = run("keys", "list", "--json")
    listed = json.loads(told)
    assert [one["name"] for one in listed] == ["shop", "boss"]
    assert listed[1] == {key: value for key, value in made.items() if key != "key"}
    assert "shop" in run("keys", "list")[1]
    for file in tmp_path.rglob("*"):
        secret = made["key"].rpartition("-")[2].encode()
        assert file.is_dir() or secret not in file.read_bytes()


def test_rotate_and_revoke_by_id_name_or_the_key_itself(run: Run) -> None:
    first = run("keys", "create", "shop", "--role", "client")[1].strip()
    second = json.loads(run("keys", "rotate", "shop", "--overlap", "5", "--json")[1])
    assert second["previous_until"] > second["created_at"] and second["key"] != first
    third = run("keys", "rotate", second["id"])[1].strip()
    with Store.open(load_settings().store_url) as store:
        kept = store.get_key("shop")
    assert (kept.hash, kept.previous_hash) == (hash_of(third), None)
    assert run("keys", "revoke", first)[:2] == (0, f"{kept.id} (shop) is revoked\n")
    assert json.loads(run("keys", "revoke", "shop", "--json")[1])["state"] == "revoked"
    code, _, said = run("keys", "rotate", third)
    assert code == 5 and "revoked" in said and third not in said
    assert run("keys", "revoke", "nobody")[0] == 4
    code, told, _ = run("audit", "list", "--json")
    lines = json.loads(told)
    assert [(one["action"], one["target"], one["result"]) for one in reversed(lines)] == [
        ("create_key", kept.id, "ok"),
        ("rotate_key", kept.id, "ok"),
        ("rotate_key", kept.id, "ok"),
        ("revoke_key", kept.id, "ok"),
        ("revoke_key", kept.id, "ok"),
        ("rotate_key", kept.id, "key_revoked"),
        ("revoke_key", "nobody", "not_found"),
    ]
    assert {(one["key_id"], one["name"], one["wire"]) for one in lines} == {("os", os_user(), "cli")}
    assert first not in told and third not in told
    assert run("audit", "list", "--limit", "1", "--action", "create_key")[1].splitlines()[1].split()[4] == "create_key"


@pytest.mark.parametrize("written", ["{}", "Bearer {}", "{}0", "{:.80}"])
def test_a_key_that_is_not_copied_whole_reaches_no_line(run: Run, written: str) -> None:
    text = run("keys", "create", "shop", "--role", "client")[1].strip()
    assert run("keys", "revoke", written.format(text))[0] == 0
    assert text[24:64] not in run("audit", "list", "--json")[1]


@pytest.mark.parametrize(
    "arguments",
    [("create", "x", "--role", "king"), ("create", "x"), ("create", "key_x", "--role", "client")],
)
def test_a_key_that_cannot_be_is_refused(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("keys", *arguments)[0] == 2
    assert run("keys", "list", "--json")[1] == "[]\n"


def test_what_goes_straight_to_the_store_is_audited(run: Run, tmp_path: Path) -> None:
    with Store.open(load_settings().store_url) as store:
        job = store.create_job("dpo", {}, "none", "operator")
    assert run("jobs", "cancel", job.id)[0] == 0
    assert run("prefs", "forget", "u-17", "--yes")[0] == 0
    (tmp_path / "empty.jsonl").write_text("")
    assert run("prefs", "import", str(tmp_path / "empty.jsonl"))[0] == 0
    lines = json.loads(run("audit", "list", "--json")[1])
    assert [(one["action"], one["target"], one["result"]) for one in reversed(lines)] == [
        ("cancel_job", job.id, "ok"),
        ("forget_end_user", None, "ok"),
        ("import_preferences", None, "ok"),
    ]


def test_commands_show_the_key_of_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_API_KEY", "mine")
    with serving({"GET /noria/v1/audit": page()}) as server:
        assert call(["--url", server.url, "audit", "list", "--json"]) == 0
        assert server.keys == {"Bearer mine"}
        monkeypatch.delenv("NORIA_API_KEY")
        monkeypatch.setenv("NORIA_SERVER__API_KEY", "the server's")
        assert call(["--url", server.url, "audit", "list", "--json"]) == 0
        assert server.keys == {"Bearer mine", "Bearer the server's"}


def test_up_draws_a_key_for_its_trainer_which_shows_it_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_trainer_key({"NORIA_HOME": str(tmp_path), "PATH": "x"})
    drawn = environment["NORIA_SERVER__TRAINER_KEY"]
    assert len(drawn) == 64 and drawn != with_trainer_key({})["NORIA_SERVER__TRAINER_KEY"]
    monkeypatch.setenv("NORIA_SERVER__TRAINER_KEY", drawn)
    ours = Settings(home=tmp_path)
    assert key_of((), ours) == drawn and ours.shown_key is None
    assert key_of(("http://there:1",), ours) is None
    assert key_of((), Settings(home=tmp_path, url="http://there:1")) is None
    for more in ({"api_key": "mine"}, {"server": {"api_key": "mine"}}):
        assert key_of((), Settings(home=tmp_path, **more)) == key_of(("grpc://x:1",), Settings(home=tmp_path, **more))
        assert key_of((), Settings(home=tmp_path, **more)) == "mine"
