"""Puts sampling together over a running engine.

Comes in: the raw engine, vLLM's application state, the gate, settings. Goes out: a `Sampling` for as long as a block
runs; at its end every group is ended and every adapter unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from noria.settings import Settings
from serve.access.audit import Audit
from serve.engine.environment import has_gpu
from serve.engine.versions import VersionGate
from serve.sampling.adapters.shelf import AdapterShelf, own_folder
from serve.sampling.engine import sampling_engine
from serve.sampling.metrics import export_sampling
from serve.sampling.service import Sampling
from serve.sampling.turns import Turns


@asynccontextmanager
async def sampling_over(
    engine: Any, state: Any, gate: VersionGate, settings: Settings, audit: Audit
) -> AsyncIterator[Sampling]:
    """Sampling, its leases kept and its counters exported."""
    from prometheus_client import REGISTRY

    folder = await asyncio.to_thread(own_folder, settings.home)
    over = await sampling_engine(engine, state)
    most, max_rank = settings.engine.policy_adapters, settings.engine.policy_rank
    shelf = AdapterShelf(over, gate, folder, most=most, max_rank=max_rank)
    turns = turns_for(settings, engine.vllm_config.scheduler_config.max_num_seqs)
    sampling = Sampling(over, gate, shelf, turns, audit)
    collector = export_sampling(sampling)
    keeping = asyncio.create_task(sampling.keep(), name="sampling")
    try:
        yield sampling
    finally:
        keeping.cancel()
        REGISTRY.unregister(collector)
        await sampling.close()


def turns_for(settings: Settings, sequences: int) -> Turns:
    """How many samples may run, alone and beside users, where the settings leave it open."""
    asked = settings.sampling
    alone = min(asked.sequences or sequences, sequences)
    beside = asked.beside_users
    if beside is None:
        beside = max(1, sequences // 4) if has_gpu() else 1
    return Turns(alone, beside)
