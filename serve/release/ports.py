"""What the release needs of the engine, as vLLM 0.31's AsyncLLM has it; tests satisfy it with a small class.

Comes in: nothing. Goes out: the `Engine` protocol. Must not import vllm.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol


class Engine(Protocol):
    """The part of AsyncLLM that a swap uses: the engine itself, not the proxy that passes the gate."""

    async def pause_generation(self, *, mode: Any = ..., clear_cache: bool = ...) -> None:
        """Mode `wait` returns when running requests have ended; new ones queue until `resume_generation`."""
        ...

    async def resume_generation(self) -> None:
        """Lets queued requests run."""
        ...

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ...) -> list[Any]:
        """Calls a method of every worker; one result each."""
        ...

    async def reset_prefix_cache(self, reset_running_requests: bool = ..., reset_connector: bool = ...) -> bool:
        """Forgets KV blocks of earlier prompts; False when some are still in use."""
        ...

    async def reset_encoder_cache(self) -> None:
        """Forgets the vision tower's outputs."""
        ...

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        """Runs one request; the last item is the finished output."""
        ...
