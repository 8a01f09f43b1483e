"""Servers that come back under another address are found, and get the adapter again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from noria.errors import Unavailable
from noria.records import Json, ProcessInfo
from noria.sampling.records import Drawing, Group
from noria.settings import Settings
from noria.store import Store
from train.methods.grpo.sampling.servers import Servers, addresses


class Opened:
    """A pool that notes what it is asked."""

    def __init__(self, found: Sequence[str], told: list[str]) -> None:
        self.at = "+".join(found)
        self.told = told

    def note(self, what: str) -> None:
        """One line a call."""
        self.told.append(f"{self.at} {what}")

    def version(self) -> str:
        """Where it is."""
        return self.at

    def put_adapter(self, name: str, folder: Path, version: str) -> None:
        """Notes it; the address `full` refuses."""
        if self.at == "full":
            raise Unavailable("not now")
        self.note(f"put {name} for {version} from {folder.name}")

    def delete_adapter(self, name: str) -> None:
        """Notes it."""
        self.note(f"delete {name}")

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """A group a prompt."""
        for number, messages in enumerate(prompts):
            yield Group(number, tuple(messages), self.at, adapter=adapter, version=version or "")

    def close(self) -> None:
        """Notes it."""
        self.note("closed")


def test_the_adapter_follows_the_servers() -> None:
    told: list[str] = []
    found: list[tuple[str, ...]] = [()]

    def ask(servers: Servers) -> list[str]:
        groups = servers.sample([[{"role": "user", "content": "hi"}]], Drawing(), adapter="a", version="v1")
        return [group.address for group in groups]

    with Servers(lambda: found[-1], lambda some: Opened(some, told)) as servers:
        with pytest.raises(Unavailable, match="no server is up; start one with `noria up`"):
            servers.version()
        found.append(("one",))
        servers.put_adapter("a", Path("adapter"), "v1")
        assert ask(servers) == ["one"]
        found.append(())  # none has beaten lately: the one that was known may still answer
        assert ask(servers) == ["one"]
        found.append(("full",))
        with pytest.raises(Unavailable, match="not now"):
            ask(servers)
        found.append(("one", "two"))
        assert ask(servers) == ["one+two"]
        servers.delete_adapter("a")
        found.append(("three",))
        assert servers.version() == "three"
    assert told == [
        "one put a for v1 from adapter",
        "one closed",
        "full closed",
        "one+two put a for v1 from adapter",
        "one+two delete a",
        "one+two closed",
        "three closed",
    ]


def test_where_servers_are_looked_for(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        home: dict[str, Any] = {"home": tmp_path}
        assert addresses(("http://a:1",), Settings(**home, url="http://b:2"), store)() == ("http://a:1",)
        assert addresses((), Settings(**home, url="http://b:2"), store)() == ("http://b:2",)
        beating = addresses((), Settings(**home), store)
        assert list(beating()) == []
        for number, at in ((2, time.time()), (1, time.time()), (3, time.time() - 100)):
            info = {"url": f"http://h:{number}", "grpc": f"h:{number}00"}
            store.beat(ProcessInfo(f"server-{number}", "server", at, info))
        store.beat(ProcessInfo("trainer-1", "trainer", time.time(), {}))
        store.beat(ProcessInfo("server-4", "server", time.time(), {"url": "https://h:4", "grpc": "h:400"}))
        assert list(beating()) == ["grpc://h:100", "grpc://h:200", "grpcs://h:400"]
