"""The processes around the engine: their environment, and the fork server that has vLLM loaded already.

Comes in: settings. Goes out: environment variables, a fork server, a multiprocessing context. Must be called before
anything imports vllm or torch, and must not import them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from noria.settings import Settings

PRELOAD = "serve.engine.preload"


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; told without importing torch, for CUDA must not start in this process."""
    return Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def set_environment(settings: Settings) -> None:
    """Sets what vLLM and OpenMP read when they are loaded. A variable that the operator has set stays.

    OMP_WAIT_POLICY: with spinning threads an engine beside a busy trainer starves (no answer in 100 s on two cores).
    """
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",  # this process ends itself, after capture is drained
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # versions are folders; nothing is ever downloaded here
    }
    if not has_gpu():
        threads = settings.engine.threads or os.cpu_count() or 1
        defaults |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        defaults["VLLM_CPU_INT4_W4A8"] = str(int(settings.engine.int8_activations))
        if settings.engine.fast_start:
            defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lets the CPU's worker live in the engine process
        if settings.engine.enforce_eager is not False:
            defaults["TORCHDYNAMO_DISABLE"] = "1"  # vLLM 0.31 compiles its sampler even so: six seconds, first request
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_MEDIA_CONNECTOR"] = "noria"  # serve.engine.media: also over what the operator has set
    if settings.engine.threads is not None and not has_gpu():
        os.environ["OMP_NUM_THREADS"] = str(settings.engine.threads)


def start_fork_server() -> None:
    """Starts the process from which the engine is forked; it loads vLLM while this process does the same.

    It ignores SIGINT: a Ctrl-C reaches the whole group, and the engine is ended by us, after the last answer.
    """
    forkserver.set_forkserver_preload([PRELOAD])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def engines_from_fork_server() -> Iterator[None]:
    """Inside, vLLM starts its engine process from the fork server.

    vLLM 0.31 refuses the word in VLLM_WORKER_MULTIPROC_METHOD, so the function with which its engine module chooses a
    context is replaced for as long as the engine starts.
    """
    import vllm.v1.engine.utils as chooser

    original = chooser.get_mp_context
    chooser.get_mp_context = _fork_server_context
    try:
        yield
    finally:
        chooser.get_mp_context = original


def _fork_server_context() -> Any:
    return multiprocessing.get_context("forkserver")
