"""TLS and mutual TLS on both wires, with certificates made here."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from noria.client import AsyncNoriaClient, NoriaClient
from noria.errors import Unavailable
from noria.sampling import Drawing, SamplingPool
from noria.sampling.places import place_at
from noria.tls import Trust
from tests.certificates import Papers, issue
from tests.contract.conftest import System, fake_system
from tests.contract.doors import GrpcDoor, HttpDoor
from tests.contract.test_sampling import WORDS


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """Certificates of one authority."""
    return issue(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def secure(papers: Papers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system that speaks TLS."""
    home = tmp_path_factory.mktemp("tls") / "home"
    with fake_system(home, server={"tls": papers.server()}, trust=papers.trust()) as system:
        yield system


@pytest.fixture(scope="module")
def mutual(papers: Papers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system that asks its callers for a certificate."""
    home = tmp_path_factory.mktemp("mutual") / "home"
    tls = papers.server(mutual=True)
    with fake_system(home, server={"tls": tls}, trust=papers.trust(client="client")) as system:
        yield system


def ports(system: System) -> tuple[str, str]:
    """Where its HTTPS and its gRPC are."""
    assert system.fake is not None
    return f"https://127.0.0.1:{system.fake.http_port}", f"127.0.0.1:{system.fake.grpc_port}"


def unreachable(system: System, trust: Trust | None) -> None:
    """Neither wire answers a caller with this trust (None speaks no TLS at all)."""
    url, address = ports(system)
    door = HttpDoor(url if trust else url.replace("https", "http"), None, trust)
    with pytest.raises(httpx.TransportError):
        door.status()
    stub = GrpcDoor(address, None, trust)
    stub._options["timeout"] = 10
    with pytest.raises((grpc.RpcError, AssertionError)) as refusal:
        stub.status()
    assert "UNAVAILABLE" in str(refusal.value)


def test_both_wires_speak_tls(secure: System) -> None:
    for door in (secure.http, secure.grpc):
        assert door.chat("hello", store=False)["model_version"] == "v1"
        assert [*door.stream("hello", store=False)][-1]["usage"]["completion_tokens"] == 5
    assert secure.http.status()["live"] == secure.grpc.status()["live"] == "v1"


def test_who_does_not_know_the_authority_is_not_answered(secure: System, papers: Papers) -> None:
    """Nor who speaks no TLS."""
    stranger = issue_elsewhere(papers, "stranger")
    unreachable(secure, stranger)
    unreachable(secure, None)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_of_tls_are_refused(secure: System, papers: Papers) -> None:
    context = papers.trust().context()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    assert secure.fake is not None
    with (
        socket.create_connection(("127.0.0.1", secure.fake.http_port), timeout=10) as raw,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_callers_certificate_is_asked_for(mutual: System, papers: Papers) -> None:
    """One of the authority is taken; none, and another authority's, are refused on both wires."""
    assert mutual.http.status()["live"] == mutual.grpc.status()["live"] == "v1"
    unreachable(mutual, papers.trust())
    cert, key = papers.pair("forged", authority=trustme.CA())
    unreachable(mutual, Trust(papers.ca, cert, key))


def test_a_certificate_may_be_optional(papers: Papers, tmp_path: Path) -> None:
    """Without one a caller is let in; a wrong one is still refused on HTTP. gRPC asks for none."""
    tls = {**papers.server(mutual=True), "require_client_cert": False}
    with fake_system(tmp_path / "home", server={"tls": tls}, trust=papers.trust()) as system:
        assert system.http.status()["live"] == system.grpc.status()["live"] == "v1"
        cert, key = papers.pair("forged", authority=trustme.CA())
        forged = HttpDoor(ports(system)[0], None, Trust(papers.ca, cert, key))
        with pytest.raises(httpx.TransportError):
            forged.status()


async def test_clients_and_sampling_take_an_authority(mutual: System, papers: Papers) -> None:
    """`NoriaClient`, `AsyncNoriaClient`, and both kinds of sampling address."""
    url, address = ports(mutual)
    trust = papers.trust(client="client")
    with NoriaClient(url, trust=trust) as client:
        assert client.status()["live"] == "v1"
    async with AsyncNoriaClient(url, trust=trust) as client_:
        assert (await client_.status())["live"] == "v1"
    for sampling in (url, f"grpcs://{address}"):
        place = place_at(sampling, trust=trust)
        assert place.sample(WORDS)["version"] == "v1"
        place.close()
        with pytest.raises(Unavailable, match="does not answer"):
            place_at(sampling).list_adapters()
    with SamplingPool([url, f"grpcs://{address}"], trust=trust) as pool:
        assert pool.version() == "v1"
        assert [one.version for one in pool.sample([WORDS["messages"]], Drawing(n=1))] == ["v1"]
    with NoriaClient(url) as stranger, pytest.raises(Unavailable, match="NORIA_TLS_CA"):
        stranger.status()


def test_a_renewed_certificate_is_shown_without_a_restart(papers: Papers, tmp_path: Path) -> None:
    """The authority changes, too: only who trusts the new one is answered afterwards, on both wires."""
    folder = tmp_path / "papers"
    folder.mkdir()
    own = issue(folder)
    with fake_system(tmp_path / "home", server={"tls": own.server()}, trust=own.trust()) as system:
        url, address = ports(system)
        assert system.http.status()["live"] == "v1"
        new = trustme.CA()
        own.pair("server", authority=new)
        new.cert_pem.write_to_path(folder / "new.pem")
        assert system.fake is not None and system.fake.certificates is not None
        certificates = system.fake.certificates
        certificates.look()
        system.fake.on_loop(certificates.renew_context)
        trust = Trust(folder / "new.pem")
        assert HttpDoor(url, None, trust).status()["live"] == "v1"
        assert GrpcDoor(address, None, trust).status()["live"] == "v1"
        assert [certificates.loaded, certificates.refused] == [1, 0]
        unreachable(system, own.trust())


def test_an_idle_connection_does_not_hold_up_the_end(papers: Papers, tmp_path: Path) -> None:
    """Its client looks for the goodbye only afterwards; `FakeSystem.stop` raises where the end takes long."""
    with fake_system(tmp_path / "home", server={"tls": papers.server()}, trust=papers.trust()) as system:
        assert system.fake is not None
        raw = socket.create_connection(("127.0.0.1", system.fake.http_port), timeout=10)
        idle = papers.trust().context().wrap_socket(raw, server_hostname="127.0.0.1")
        idle.sendall(b"GET /noria/v1/status HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
    while idle.recv(65536):
        pass
    idle.close()


def issue_elsewhere(papers: Papers, name: str) -> Trust:
    """Trust in another authority."""
    other = papers.folder / f"{name}.pem"
    trustme.CA().cert_pem.write_to_path(other)
    return Trust(other)
