"""The systems that the contract suite runs against, each with both doors open.

Goes out: fixture `system`, once over the fake engine and once over real vLLM on the tiny model; `door` and `other`,
each door in turn with the other one beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from noria.records import Json
from noria.settings import Settings
from noria.store import Store
from noria.tls import Trust
from tests.contract.doors import Door, GrpcDoor, HttpDoor
from tests.contract.fake_system import FakeSystem
from tests.servers import publish_tiny, start_server


@dataclass
class System:
    """A running server and its files."""

    name: str
    home: Path
    http: HttpDoor
    grpc: GrpcDoor
    fake: FakeSystem | None = None

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The server's store, to look at what it kept."""
        with Store.open(Settings(home=self.home).store_url) as store:
            yield store


@contextmanager
def fake_system(
    home: Path, api_key: str | None = None, server: Json | None = None, trust: Trust | None = None
) -> Iterator[System]:
    """A system over the fake engine; with `trust` its doors are TLS's."""
    fake = FakeSystem(home, api_key, server=server)
    fake.start()
    scheme = "http" if trust is None else "https"
    try:
        yield System(
            "fake",
            home,
            HttpDoor(f"{scheme}://127.0.0.1:{fake.http_port}", api_key, trust),
            GrpcDoor(f"127.0.0.1:{fake.grpc_port}", api_key, trust),
            fake,
        )
    finally:
        fake.stop()


@contextmanager
def vllm_system(home: Path) -> Iterator[System]:
    """A system over real vLLM, serving the tiny model."""
    home.mkdir()
    publish_tiny(home)
    small = {"NORIA_ENGINE__MAX_MODEL_LEN": "256", "NORIA_ENGINE__KV_CACHE_GIB": "0.5"}
    with start_server(home, **small) as server:
        yield System("vllm", home, HttpDoor(server.url), GrpcDoor(server.grpc))


@pytest.fixture(scope="session", params=["fake", "vllm"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system under test."""
    start = {"fake": fake_system, "vllm": vllm_system}[request.param]
    with start(tmp_path_factory.mktemp(request.param) / "home") as made:
        yield made


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, system: System) -> Door:
    """One door."""
    return system.http if request.param == "http" else system.grpc


@pytest.fixture
def other(door: Door, system: System) -> Door:
    """The door that `door` is not."""
    return system.grpc if door is system.http else system.http


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG of one colour."""
    out = BytesIO()
    Image.new("RGB", (48, 48), (200, 30, 40)).save(out, "PNG")
    return out.getvalue()
