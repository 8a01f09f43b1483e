"""Loads torch, vLLM and the kernels in a process of its own, and tells what it saw.

Run as `python -m noria.cli.doctor.probe`: a crash of a native library then ends this process and not the doctor.
Goes out: one line on standard output, PREFIX and JSON; each part is `{"error": ...}` when it could not be looked at.
Imports by name, because `noria` may not import torch or vllm.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

from noria import repair

PREFIX = "noria-probe "
CPU_KERNELS = ("cpu_gemm_wna16",)  # what CPUWNA16LinearKernel calls: GPTQ weights on a CPU
GPU_KERNELS = ("gptq_marlin_repack", "marlin_gemm", "gptq_marlin_gemm", "gptq_gemm", "machete_mm")


def look_at_torch() -> dict[str, Any]:
    """Version, the CUDA it was built for, and whether a GPU answers."""
    torch = importlib.import_module("torch")
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


def look_at_torchvision() -> dict[str, Any]:
    """Whether torchvision needs the repair and has it."""
    return repair.status()


def look_at_vllm() -> dict[str, Any]:
    """vLLM's version and the platform that it found."""
    vllm = importlib.import_module("vllm")
    platform = importlib.import_module("vllm.platforms").current_platform
    return {"version": vllm.__version__, "device": platform.device_type}


def look_at_kernels() -> dict[str, Any]:
    """Which of the kernels for GPTQ weights vLLM's C extension brings on this processor."""
    torch = importlib.import_module("torch")
    platform = importlib.import_module("vllm.platforms").current_platform
    platform.import_kernels()
    wanted = CPU_KERNELS if platform.is_cpu() else GPU_KERNELS
    return {"wanted": list(wanted), "found": [name for name in wanted if hasattr(torch.ops._C, name)]}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": look_at_torch,
    "torchvision": look_at_torchvision,
    "vllm": look_at_vllm,
    "kernels": look_at_kernels,
}


def main() -> None:
    """Looks at every part; what fails is told, not raised."""
    seen: dict[str, dict[str, Any]] = {}
    for name, look in PARTS.items():
        try:
            seen[name] = look()
        except Exception as error:  # noqa: BLE001 - the process edge: any failure is what the doctor asks for
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + PREFIX + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
