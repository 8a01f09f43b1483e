"""What sampling needs of the engine, and the values that go between them.

Comes in: nothing. Goes out: the `SamplingEngine` Protocol, satisfied by `serve.sampling.engine` and by the tests' small
engine. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from noria.records import Json


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn. `top_p` 1 and `top_k` 0 keep every token; `seed` None draws anew each time."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Prepared:
    """A prompt as the engine takes it: token ids with the images' placeholders expanded, and what is the engine's."""

    prompt_token_ids: tuple[int, ...]
    payload: Any


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sample with their log-probabilities in nats.

    `finish_reason` is None while it goes on, then stop, length or abort.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as the engine knows it: a number and a name that no other adapter of this process ever has."""

    number: int
    name: str
    path: Path


class SamplingEngine(Protocol):
    """The engine behind the gate: nothing here waits for users, captures, or checks versions."""

    tempered: bool
    """Whether `sample` gives log-probabilities at the temperature that was drawn at; else it gives them at 1."""
    context_tokens: int
    """The longest prompt plus answer."""

    async def prepare(self, messages: Sequence[Json]) -> Prepared:
        """Template, tokens, pictures. Raises InvalidRequest."""
        ...

    def sample(
        self, prepared: Prepared, said: Sequence[int], draw: Draw, request_id: str, adapter: LoadedAdapter | None
    ) -> AsyncGenerator[Piece, None]:
        """One sample that has said the tokens `said` already. Raises NoriaError when the engine fails."""
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a sample; its generator gives a last piece that says so. Nothing happens for an unknown id."""
        ...

    async def load(self, adapter: LoadedAdapter) -> None:
        """Reads the adapter's folder, which has to stay until `unload` has returned. Raises NoriaError."""
        ...

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Forgets it."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        ...
