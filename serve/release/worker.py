"""What the release adds to vLLM's worker (`--worker-extension-cls serve.release.worker.NoriaWorkerExtension`).

Comes in: calls by `AsyncLLM.collective_rpc`, in the process that holds the weights. Goes out: small plain values.
Only vLLM's worker imports this module; of Noria it imports nothing but what is made for the worker too.

A failed reload in vLLM 0.31 leaves some layers as empty `meta` tensors with wrapped loaders, and a second reload skips
them (`initialize_layerwise_reload` returns early where `can_load()`): the next request kills the engine. So after an
error every half-open layer gets its kernel tensors back and forgets what it had buffered; reloading the old version
then restores every weight exactly.
"""

from __future__ import annotations

import hashlib
import logging
import time
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise

from serve.engine.worker.lora_cpu import install
from serve.engine.worker.tempered import temper

logger = logging.getLogger(__name__)

# vLLM 0.31's int4 and attention kernels use AMX tiles without asking the kernel for them. oneDNN asks, but a model
# whose linears are all GPTQ may not have met oneDNN before its first attention: the engine dies of SIGILL. This module
# is imported in every worker before its first kernel, so it asks. It does nothing on a CPU without AMX.
if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()

install()  # before the first adapter; on a GPU nothing calls what it replaces


class NoriaWorkerExtension:
    """Mixed into vLLM's worker class; its names must not be vLLM's own."""

    model_runner: Any
    reload_weights: Any

    def reload_version(self, path: str) -> dict[str, Any]:
        """Loads the checkpoint at `path` over the running weights: `{"error": str | None, "seconds": float}`.

        After an error the model has its own tensors again, some perhaps with new values: reload the old version
        before the engine resumes. Errors are returned, not raised, so that one worker of many can say which.
        """
        started = time.perf_counter()
        error: str | None = None
        try:
            self.reload_weights(weights_path=path)
        except Exception as caught:  # noqa: BLE001 - the process's edge: whatever a loader raises goes to the caller
            closed = close_half_open(self.model_runner.get_model())
            error = f"{type(caught).__name__}: {caught}".strip().rstrip(":")
            logger.warning("reload of %s failed (%s); %d layers were put back", path, error, closed)
        return {"error": error, "seconds": time.perf_counter() - started}

    def zero_kv_cache(self) -> None:
        """Overwrites every KV block with zeros: a NaN left in a block outlives the weights that made it."""
        for cache in _tensors(self.model_runner.kv_caches):
            cache.zero_()

    def temper_logprobs(self) -> bool:
        """Has sampling's log-probabilities be those at its temperature; whether this worker can."""
        return temper(self.model_runner)

    def checksum_weights(self) -> str:
        """SHA-256 over all parameters as the kernels see them, in name order. For tests of exact recovery."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model_runner.get_model().named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def close_half_open(model: torch.nn.Module) -> int:
    """Ends a reload that failed: gives each half-open layer its kernel tensors back; returns how many there were."""
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    closed = 0
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load():
            continue
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
        info.reset()
        closed += 1
    layerwise.LOADING_LAYERS.clear()
    return closed


def _tensors(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    values = caches.values() if isinstance(caches, dict) else caches or []
    return [tensor for value in values for tensor in _tensors(value)]
