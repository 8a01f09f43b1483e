"""What the doctor looks at, one function a check; each says what is wrong and what to do.

Comes in: what the probe saw, the installed packages, the machine. Goes out: `Check` values.
Must not import torch or vllm: the probe does, in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
LEAST_DISK_GIB, GOOD_DISK_GIB = 3, 10
LEAST_MEMORY_GIB, GOOD_MEMORY_GIB = 4, 12
CUDA_PACKAGE = re.compile(r"nvidia-(cu|.*-cu[0-9]+$)")  # nvidia-ml-py, which only asks the driver, is none
SET_UP = "run `make setup` again; when that does not help, remove .venv first"


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `warn` (it works, but) or `fail`; `fix` says what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None


def python() -> Check:
    """The interpreter is one that all parts have wheels for."""
    found = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("python", "ok", found)
    return Check("python", "fail", f"{found} is not 3.11 or 3.12", "install python3.11, remove .venv, `make setup`")


def packages(extra: str) -> Check:
    """Every requirement of the distribution, with the extra that fits this machine, is met."""
    wrong = list(unmet("noria", {extra, "model"}))
    if not wrong:
        return Check("packages", "ok", f"as pyproject.toml asks, with the extra {extra}")
    return Check("packages", "fail", "; ".join(wrong), SET_UP)


def unmet(distribution: str, extras: Iterable[str]) -> Iterable[str]:
    """Each requirement that is missing or has another version, in words."""
    from packaging.requirements import Requirement

    for text in metadata.requires(distribution) or []:
        wanted = Requirement(text)
        if wanted.name == distribution:
            continue  # an extra that names another extra; both are in `extras`
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"{wanted.name} is missing"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found} is not {wanted.specifier}"


def cuda_packages(gpu: bool) -> Check:
    """No CUDA packages where there is no GPU: they are gigabytes, and a sign of the wrong torch."""
    names = sorted({str(one.metadata["Name"]).lower() for one in metadata.distributions()})
    cuda = [name for name in names if CUDA_PACKAGE.match(name)]
    if gpu or not cuda:
        return Check("cuda packages", "ok", f"{len(cuda)} installed" if cuda else "none")
    return Check("cuda packages", "fail", f"no GPU here, but installed: {', '.join(cuda)}", SET_UP)


def torch(seen: Mapping[str, Any], gpu: bool) -> Check:
    """Torch loads, and its build fits the machine."""
    if "error" in seen:
        return Check("torch", "fail", seen["error"], SET_UP)
    detail = f"{seen['version']}, {seen['threads']} threads"
    if gpu and not seen["gpu"]:
        return Check("torch", "fail", f"{detail}: it does not reach the GPU", "check the NVIDIA driver; " + SET_UP)
    if not gpu and seen["cuda"]:
        return Check("torch", "fail", f"{detail}: a CUDA build on a machine without a GPU", SET_UP)
    return Check("torch", "ok", f"{detail}, {'CUDA ' + seen['cuda'] if seen['cuda'] else 'CPU build'}")


def torchvision(seen: Mapping[str, Any]) -> Check:
    """Torchvision is sound, or the repair works."""
    if "error" in seen:
        return Check("torchvision", "fail", seen["error"], SET_UP)
    if seen["needed"] and not seen["active"]:
        return Check("torchvision", "fail", seen["detail"], "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or " + SET_UP)
    return Check("torchvision", "ok", ("repaired: " if seen["needed"] else "") + str(seen["detail"]))


def vllm(seen: Mapping[str, Any], gpu: bool) -> Check:
    """vLLM loads and has found the device."""
    if "error" in seen:
        return Check("vllm", "fail", seen["error"], SET_UP)
    detail = f"{seen['version']} on {seen['device'] or 'no device'}"
    expected = "cuda" if gpu else "cpu"
    return Check("vllm", "ok", detail) if seen["device"] == expected else Check("vllm", "fail", detail, SET_UP)


def kernels(seen: Mapping[str, Any]) -> Check:
    """vLLM's kernels for GPTQ weights load on this processor."""
    if "error" in seen:
        return Check("kernels", "fail", seen["error"], SET_UP)
    if seen["found"]:
        return Check("kernels", "ok", "GPTQ: " + ", ".join(seen["found"]))
    wanted = ", ".join(seen["wanted"])
    return Check("kernels", "fail", f"none of {wanted}", "a CPU needs AVX2 or AVX-512; else " + SET_UP)


def disk(home: Path) -> Check:
    """The home can be written, and a job's files fit beside it."""
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(there, os.W_OK):
        return Check("disk", "fail", f"{there} cannot be written", "choose another home: NORIA_HOME or --home")
    free = shutil.disk_usage(there).free / GIB
    return amount("disk", f"{free:.1f} GiB free at {home}", free, LEAST_DISK_GIB, GOOD_DISK_GIB)


def memory() -> Check:
    """Enough memory is free for a server and a trainer of the embedded model."""
    free = available_memory_gib()
    return amount("memory", f"{free:.1f} GiB available", free, LEAST_MEMORY_GIB, GOOD_MEMORY_GIB)


def amount(name: str, detail: str, found: float, least: float, good: float) -> Check:
    """`fail` below the least, `warn` below what is good."""
    if found < least:
        return Check(name, "fail", detail, f"free some: {least} GiB is the least, {good} GiB is good")
    if found < good:
        return Check(name, "warn", detail, f"enough for the embedded model; larger ones want {good} GiB and more")
    return Check(name, "ok", detail)


def cores() -> Check:
    """How many cores this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Check("cores", "warn", f"{count}", "server and trainer share one core; expect slow training")
    return Check("cores", "ok", f"{count}")


def available_memory_gib() -> float:
    """What the kernel and the container leave us, in GiB."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+([0-9]+) kB", meminfo.read_text(), re.MULTILINE)
        pages = int(found.group(1)) * 1024 if found else pages
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (told := limit.read_text().strip()) != "max":
        pages = min(pages, int(told) - int(used.read_text()))
    return pages / GIB


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there for us, by its device file or WSL's."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or (
        Path("/dev/dxg").exists() and shutil.which("nvidia-smi") is not None
    )
