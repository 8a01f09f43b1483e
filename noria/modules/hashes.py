"""The hash of a module as it lies on disk: how "this module is the same" is proven, by whoever has the files.

Comes in: where tensors lie in safetensors files. Goes out: `sha256:..` values, the same in trainer and server.
Must not import torch, numpy or safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from noria.errors import IntegrityError
from noria.modules.architecture import Architecture
from noria.records import Module

_CHUNK = 1 << 24


class StoredTensor(Protocol):
    """Where one tensor lies: bytes [`begin`, `end`) of `file`, with safetensors' word for its dtype."""

    @property
    def file(self) -> Path:
        """The safetensors file."""
        ...

    @property
    def dtype(self) -> str:
        """`F32`, `BF16`, ..."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""
        ...

    @property
    def begin(self) -> int:
        """Offset in the file, in bytes."""
        ...

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        ...


def tensor_hash(entry: StoredTensor) -> str:
    """SHA-256 (hex) over a tensor's dtype, shape and bytes. Raises IntegrityError where the file is cut short."""
    digest = hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise IntegrityError(f"{entry.file} is cut short")
            left -= len(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def group_hash(index: Mapping[str, StoredTensor], names: Iterable[str]) -> str:
    """`sha256:..` over the sorted (name, dtype, shape, bytes) of some tensors."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}:{tensor_hash(index[name])}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def module_hashes(
    architecture: Architecture, index: Mapping[str, StoredTensor], modules: Iterable[Module]
) -> dict[Module, str]:
    """The group hash of each of some modules, over a checkpoint's own tensor names."""
    parted = architecture.partition(index, spelling="checkpoint")
    return {module: group_hash(index, parted[module]) for module in modules}
