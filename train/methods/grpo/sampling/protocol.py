"""What GRPO asks of whoever samples; `noria.sampling.SamplingPool` does it over the network.

Comes in: nothing. Goes out: a Protocol. Must not import torch or `serve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from noria.records import Json
from noria.sampling.records import Drawing, Group


class Sampler(Protocol):
    """Samples from adapters beside a version.

    Every method may raise Superseded (another version serves, at every address), Unavailable (nobody answers), or what
    a server refuses with.
    """

    def version(self) -> str:
        """The version that serves."""
        ...

    def put_adapter(self, name: str, folder: Path, version: str) -> None:
        """Loads peft's two files beside that version; the folder stays until the adapter is deleted."""
        ...

    def delete_adapter(self, name: str) -> None:
        """Unloads it; one that is not there is no error."""
        ...

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """The groups as they come, each with its prompt's place; pictures are `data:` URLs."""
        ...
