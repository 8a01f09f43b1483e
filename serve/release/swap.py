"""The steps on the engine: put a checkpoint in, and put the old one back when anything went wrong.

Comes in: the raw engine and folders of validated checkpoints. Goes out: seconds, or an error that says whether the
engine is whole. The caller has closed the gate. Must not import vllm.

The cache of processed images stays: it holds pixels, which no weight has touched, in two halves that mirror each other
(vLLM 0.31). A request that waits at the gate has met the half in this process already and sends only a hash where it
found its image; clearing the halves now would end that request with an error (`Expected a cached item`).
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from noria.errors import NoriaError, Unavailable
from serve.release.ports import Engine

RELOAD_LIMIT_S = 900.0  # a reload that takes longer hangs


class ReloadFailed(NoriaError):
    """The engine refused a checkpoint. Raised by `Swapper.load`; the engine is paused and must be restored."""

    code = "reload_failed"


class Swapper:
    """One engine's weights: which folder is in it is the caller's to know."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def pause(self, wait_s: float) -> None:
        """Stops the scheduler when it is idle. Raises Unavailable, the engine running again, after `wait_s`.

        The gate is empty, so nothing should run; what came in beside the gate gets `wait_s` to end.
        """
        try:
            await asyncio.wait_for(self._engine.pause_generation(mode="wait", clear_cache=False), wait_s)
        except TimeoutError:
            await self._engine.resume_generation()  # a pause whose caller gives up lasts (vLLM 0.31)
            raise Unavailable(
                f"the engine was not idle after {wait_s:g} s; the swap was given up", code="drain_timeout"
            ) from None

    async def load(self, serving: Path) -> float:
        """Loads a checkpoint into the paused engine, forgets what the old weights computed, resumes; seconds taken.

        Raises ReloadFailed. The engine stays paused then: `restore` comes next.
        """
        started = time.perf_counter()
        await self._reload(serving)
        await self._forget()
        await self._engine.resume_generation()
        return time.perf_counter() - started

    async def restore(self, serving: Path) -> float:
        """Loads the version that ran before, zeroes the KV blocks (a NaN in one outlives its weights), and resumes.

        Works on a paused and on a running engine. Raises whatever failed: the engine is lost then.
        """
        started = time.perf_counter()
        await asyncio.wait_for(self._engine.pause_generation(mode="abort", clear_cache=False), RELOAD_LIMIT_S)
        await self._reload(serving)
        await self._call("zero_kv_cache")
        await self._forget()
        await self._engine.resume_generation()
        return time.perf_counter() - started

    async def _reload(self, serving: Path) -> None:
        for result in await self._call("reload_version", str(serving)):
            if result["error"] is not None:
                raise ReloadFailed(f"the engine could not load {serving.parent.name}: {result['error']}")

    async def _call(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.wait_for(self._engine.collective_rpc(method, args=args), RELOAD_LIMIT_S)

    async def _forget(self) -> None:
        """The old weights' keys, values and image features.

        vLLM 0.31's reload empties the worker's image features; the scheduler goes on counting on them, and the next
        request with a known picture would end the engine (`Encoder cache miss`). This empties both.
        """
        if not await self._engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise ReloadFailed("the engine still holds keys and values of the old weights")
        await self._engine.reset_encoder_cache()
