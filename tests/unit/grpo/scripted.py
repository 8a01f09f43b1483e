"""A sampler that serves v1 and answers as a test has written; nobody puts an adapter there.

Comes in: `groups`, of a subclass. Goes out: the groups of each call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from noria.records import Json
from noria.sampling.records import Drawing, Group


class ScriptedSampler(ABC):
    """All of a sampler but its answers."""

    @abstractmethod
    def groups(self, asked: list[Sequence[Json]], drawing: Drawing, adapter: str | None) -> Iterator[Group]:
        """The answers to a call's prompts; may raise what a server would."""

    def version(self) -> str:
        """Always the same."""
        return "v1"

    def put_adapter(self, name: str, folder: Path, version: str) -> None:
        """Not used."""
        raise AssertionError

    def delete_adapter(self, name: str) -> None:
        """Not used."""
        raise AssertionError

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """What is written."""
        return self.groups(list(prompts), drawing, adapter)
