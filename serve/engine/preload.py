"""Imported once by the fork server, so that an engine process starts with vLLM loaded.

Comes in: nothing. Goes out: loaded modules, and children that end with their parent. Imported by name only
(`serve.engine.environment.PRELOAD`), for it loads everything. It must not start threads or touch a GPU: what is
forked from here would inherit that.
"""

import ctypes
import importlib
import os
import signal

import vllm.model_executor.layers.quantization.auto_gptq
import vllm.model_executor.model_loader
import vllm.model_executor.models.registry
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor  # noqa: F401

from serve.engine.environment import has_gpu

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies


def die_with_parent() -> None:
    """Has Linux kill this process when its parent ends: the fork server with the server, the engine with both.

    Without it a `kill -9` of the server would leave the engine, and the engine would keep the fork server alive.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if not has_gpu():
    importlib.import_module("vllm.v1.worker.cpu_worker")
if hasattr(ctypes.CDLL(None), "prctl"):
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
