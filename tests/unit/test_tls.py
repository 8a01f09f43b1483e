"""Files of certificates: what is wrong with them is said before anything listens, and renewed ones are taken up."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from noria.errors import SettingsError
from noria.settings import Settings, TlsSettings, load_settings
from noria.tls import Trust
from serve.aside import aside_settings
from serve.process import addresses
from serve.tls import Certificates, certificates_of
from tests.certificates import Papers, issue


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    """Certificates of one authority."""
    return issue(tmp_path)


def refused(**settings: Path) -> SettingsError:
    """What the server says of its files."""
    with pytest.raises(SettingsError) as caught:
        Certificates(TlsSettings(**settings))
    return caught.value


def test_without_files_there_is_no_tls() -> None:
    assert certificates_of(TlsSettings()) is None
    with pytest.raises(SettingsError, match=r"needs server\.tls\.cert"):
        Certificates(TlsSettings())


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ({"cert": "a.pem"}, "server.tls.cert is set without server.tls.key"),
        ({"key": "a.key"}, "server.tls.key is set without server.tls.cert"),
        ({"client_ca": "ca.pem"}, "server.tls.client_ca is set without server.tls.cert and server.tls.key"),
    ],
)
def test_half_a_configuration_is_refused(tls: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        TlsSettings.model_validate(tls)
    with pytest.raises(SettingsError, match=said):
        load_settings(home=tmp_path, server={"tls": tls})


def test_a_file_that_is_not_there_is_named(papers: Papers) -> None:
    cert, key = papers.pair("server")
    error = refused(cert=papers.folder / "none.pem", key=key)
    assert (error.param, error.message.partition(": ")[0]) == ("server.tls.cert", "server.tls.cert")
    assert "none.pem: No such file" in error.message
    error = refused(cert=cert, key=papers.folder)
    assert error.param == "server.tls.key"
    assert "Is a directory" in error.message
    error = refused(cert=cert, key=key, client_ca=papers.folder / "nobody.pem")
    assert error.param == "server.tls.client_ca"


def test_another_certificates_key_is_told(papers: Papers) -> None:
    cert, _ = papers.pair("server")
    _, other = papers.pair("other")
    assert f"{other} is not the key of the certificate in {cert}" in refused(cert=cert, key=other).message


def test_files_that_hold_something_else_are_told(papers: Papers) -> None:
    cert, key = papers.pair("server")
    words = papers.folder / "words.pem"
    words.write_text("no certificate")
    assert "no certificate and key in PEM" in refused(cert=words, key=key).message
    assert "holds no certificates" in refused(cert=cert, key=key, client_ca=words).message


def test_a_clients_files_are_told_alike(papers: Papers) -> None:
    cert, _ = papers.pair("client")
    for trust, param, said in (
        (Trust(papers.folder / "none.pem"), "tls_ca", "No such file"),
        (Trust(papers.ca, cert), "tls_key", "tls_cert is set without tls_key"),
        (Trust(papers.ca, cert, papers.pair("other")[1]), "tls_cert", "is not the key"),
    ):
        for use in (trust.context, trust.channel_credentials):
            with pytest.raises(SettingsError, match=said) as caught:
                use()
            assert caught.value.param == param


def test_trust_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"NORIA_TLS_{name}", f"/x/{name}.pem")
    assert Settings(home=tmp_path).trust == Trust(Path("/x/CA.pem"), Path("/x/CERT.pem"), Path("/x/KEY.pem"))


def replace(papers: Papers, name: str) -> None:
    """Puts another pair where the server's is, as renewals do: by renaming."""
    for new, old in zip(papers.pair(name), ("server.pem", "server.key"), strict=True):
        shutil.copy(new, papers.folder / "beside")
        os.replace(papers.folder / "beside", papers.folder / old)


def test_a_renewed_pair_is_taken_up_and_a_broken_one_is_not(papers: Papers) -> None:
    found = Certificates(TlsSettings.model_validate(papers.server()))
    counts = {"noria_tls_loaded": 0.0, "noria_tls_refused": 0.0}

    def counted() -> dict[str, float]:
        return {one.name: one.samples[0].value for one in found.collect()}

    found.look()
    assert counted() == counts
    first = found._pair
    replace(papers, "renewed")
    found.look()
    assert counted() == {**counts, "noria_tls_loaded": 1.0}
    assert found._pair != first
    good = found._pair
    (papers.folder / "server.key").write_text("half")
    found.look()
    found.look()  # told once, not at every look
    assert counted() == {"noria_tls_loaded": 1.0, "noria_tls_refused": 1.0}
    assert found._pair == good
    (papers.folder / "server.key").unlink()
    found.look()
    assert found.refused == 2
    replace(papers, "mended")
    found.look()
    assert counted() == {"noria_tls_loaded": 2.0, "noria_tls_refused": 2.0}


def test_https_keeps_a_pair_that_works_when_the_next_is_broken_at_once(papers: Papers) -> None:
    """gRPC took a renewed pair up; before HTTPS does, the files are broken."""
    found = Certificates(TlsSettings.model_validate(papers.server()))
    replace(papers, "renewed")
    found.look()
    shutil.copy(papers.pair("mended")[0], papers.folder / "server.pem")  # its key is not there yet
    found.look()
    found.renew_context()
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = ssl.create_default_context(cafile=str(papers.ca))
    client = caller.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = found.context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert client.version() == "TLSv1.3"
    shutil.copy(papers.folder / "mended.key", papers.folder / "server.key")
    found.look()
    found.renew_context()
    assert found._in_context is found._pair


def test_addresses_say_what_they_speak(papers: Papers) -> None:
    plain = Settings(home=papers.folder).server
    assert addresses(plain, 80, 81) == {"url": "http://127.0.0.1:80", "grpc": "127.0.0.1:81"}
    tls = plain.model_copy(update={"host": "0.0.0.0", "tls": TlsSettings.model_validate(papers.server())})  # noqa: S104
    assert addresses(tls, 80, 81) == {"url": "https://127.0.0.1:80", "grpc": "127.0.0.1:81"}
    named = tls.model_copy(update={"tls": tls.tls.model_copy(update={"name": "noria.example"})})
    assert addresses(named, 80) == {"url": "https://noria.example:80"}


def test_a_server_aside_on_loopback_needs_no_tls(papers: Papers) -> None:
    tls = TlsSettings.model_validate(papers.server())
    server = Settings(home=papers.folder).server.model_copy(update={"tls": tls})
    assert not aside_settings(server).tls.on
    assert aside_settings(server.model_copy(update={"host": "10.0.0.1"})).tls == tls
