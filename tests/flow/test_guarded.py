"""The wheel turns behind a locked door: mutual TLS and keys on both wires, the trainer's own key, GRPO and a swap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI, PermissionDeniedError
from rich.console import Console

from noria.client import NoriaClient
from noria.demo.processes import running_system
from noria.errors import Forbidden, Unavailable
from noria.records import Json
from noria.settings import Settings
from noria.store import Store
from tests.certificates import Papers, issue
from tests.flow.test_grpo import JOB, SETTINGS

ROLES = ("client", "annotator", "operator")
VERIFY: Json = {"samples": 4, "max_kl": 5.0}
STEPS = 2


@dataclass
class Guarded:
    """A running `noria up` with a key of every role."""

    home: Path
    url: str
    papers: Papers
    keys: dict[str, str]

    def noria(self, role: str) -> NoriaClient:
        """A client with that role's key."""
        return NoriaClient(self.url, api_key=self.keys[role], trust=self.papers.trust(client=role))

    def openai(self, role: str) -> OpenAI:
        """OpenAI's own client, as an application has it."""
        http: Any = httpx.Client(verify=self.papers.trust(client=role).context())
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[role], http_client=http, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def guarded(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The tiny model behind certificates and keys."""
    folder = tmp_path_factory.mktemp("guarded")
    home, papers = folder / "home", issue(folder)
    home.mkdir()
    with Store.open(Settings(home=home).store_url) as store:
        keys = {role: store.create_key(role, [role])[1] for role in ROLES}
    own = papers.trust(client="trainer")
    tls = {f"NORIA_SERVER__TLS__{name.upper()}": str(path) for name, path in papers.server(mutual=True).items()}
    shown = {"NORIA_TLS_CA": str(own.ca), "NORIA_TLS_CERT": str(own.cert), "NORIA_TLS_KEY": str(own.key)}
    settings = {**SETTINGS, **tls, **shown, "NORIA_LIMITS__REQUESTS_PER_MINUTE": "600"}
    console = Console(quiet=True)
    with running_system(home, log=folder / "up.log", console=console, model=str(tiny_vlm), settings=settings) as url:
        yield Guarded(home, url, papers, keys)


def ask(client: OpenAI, text: str) -> str:
    """The fingerprint of one answer."""
    said = client.chat.completions.create(
        model="noria", messages=[{"role": "user", "content": text}], max_tokens=8, n=2, temperature=1
    )
    return str(said.system_fingerprint)


def test_nobody_comes_in_without_both(guarded: Guarded) -> None:
    """No certificate: no connection. No key, or one of another role: the refusal says so, on both wires."""
    assert guarded.url.startswith("https://")
    bare = NoriaClient(guarded.url, api_key=guarded.keys["operator"], trust=guarded.papers.trust())
    with bare, pytest.raises(Unavailable):
        bare.status()
    with guarded.noria("client") as client, pytest.raises(Forbidden):
        client.create_job(method="grpo")
    with guarded.openai("annotator") as annotator, pytest.raises(PermissionDeniedError):
        ask(annotator, "Who?")


def test_a_policy_is_trained_from_the_locked_server_and_goes_live(guarded: Guarded) -> None:
    """The trainer finds the server, samples with the key that `noria up` drew for it, and the result answers."""
    with guarded.openai("client") as client:
        assert ask(client, "Before?").startswith("v1-")
    settings = {**JOB, "grpo": {**JOB["grpo"], "steps": STEPS}, "verify": VERIFY}
    with guarded.noria("operator") as operator:
        job = operator.create_job(method="grpo", settings=settings, rollout="direct")
        events = list(operator.watch_job(job["id"]))
        ended = operator.job(job["id"])
        assert ended["state"] == "succeeded", (ended["error"], events[-3:])
        assert operator.status()["live"] == ended["version"] == "v2"
        audited = [(one["action"], one["name"]) for one in operator.audit_events()]
    assert ("create_job", "operator") in audited
    with guarded.openai("client") as client:
        assert ask(client, "After?").startswith("v2-")


def test_the_command_line_finds_its_way_in(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key and the certificate in its environment, as the page on keys has it."""
    from noria.cli.main import call

    own = guarded.papers.trust(client="cli")
    named = {"API_KEY": guarded.keys["operator"], "TLS_CA": own.ca, "TLS_CERT": own.cert, "TLS_KEY": own.key}
    for name, value in named.items():
        monkeypatch.setenv(f"NORIA_{name}", str(value))
    assert call(["--home", str(guarded.home), "status", "--json"]) == 0
