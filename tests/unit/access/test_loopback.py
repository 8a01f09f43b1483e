"""Without keys a server listens on this machine's own addresses only, unless somebody says that it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from noria.access.loopback import is_loopback, require_keys_beyond_loopback
from noria.cli.main import call
from noria.errors import SettingsError
from noria.settings import ServerSettings, load_settings
from noria.store import Store
from serve.__main__ import parse
from serve.access.audit import Audit
from serve.access.start import access_over, said_of_keys


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("", False),
        ("no.such.host.invalid", False),
        ("x" * 300, False),
    ],
)
def test_addresses_of_this_machine(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_server_without_keys_refuses_other_addresses() -> None:
    open_host = ServerSettings(host="0.0.0.0")  # noqa: S104
    with pytest.raises(SettingsError, match="noria keys create") as told:
        require_keys_beyond_loopback(open_host, has_keys=False)
    assert told.value.param == "server.host" and "--insecure" in told.value.message
    require_keys_beyond_loopback(open_host, has_keys=True)
    for more in ({"api_key": "k"}, {"insecure": True}, {"host": "127.0.0.1"}):
        require_keys_beyond_loopback(ServerSettings(**{"host": "0.0.0.0", **more}), has_keys=False)  # noqa: S104
    with pytest.raises(SettingsError):  # the key of our own trainer lets nobody else in, and keeps nobody out
        require_keys_beyond_loopback(ServerSettings(host="0.0.0.0", trainer_key="k"), has_keys=False)  # noqa: S104


async def test_the_server_says_how_open_it_is(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        own, others = ServerSettings(), ServerSettings(host="0.0.0.0", insecure=True)  # noqa: S104
        for server, word in ((own, "only this machine"), (others, "INSECURE")):
            async with access_over(store, server, Audit(store)) as access:
                assert word in (said_of_keys(access, server) or "")
        closed = ServerSettings(host="0.0.0.0")  # noqa: S104
        with pytest.raises(SettingsError):
            async with access_over(store, closed, Audit(store)):
                raise AssertionError("it was let through")
        store.create_key("shop", ["client"])
        store.revoke_key("shop")  # revoked or not: nobody comes in without a key any more
        async with access_over(store, closed, Audit(store)) as access:
            assert said_of_keys(access, closed) is None


def test_up_refuses_before_it_builds_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("noria.cli.up.command.plan", lambda *_: pytest.fail("it went on"))
    assert call(["--home", str(tmp_path), "up", "--host", "0.0.0.0"]) == 2  # noqa: S104
    assert "no key is configured" in capsys.readouterr().err


def test_the_flag_and_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))
    assert parse(["--insecure"])[0].server.insecure and not parse([])[0].server.insecure
    (tmp_path / "noria.toml").write_text('api_key = "k"\n[server]\ninsecure = true\n')
    assert parse([])[0].server.insecure
    settings = load_settings()
    assert settings.shown_key == "k" and "k" not in settings.model_dump(mode="json")["api_key"]
    assert load_settings(server={"api_key": "s"}).shown_key == "k"
    monkeypatch.setenv("NORIA_API_KEY", "e")
    assert load_settings().shown_key == "e"
