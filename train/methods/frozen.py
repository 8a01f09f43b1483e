"""Frozen means frozen: modules without autograd, hashed before and after.

Comes in: a loaded transformers model and its architecture from the module map. Goes out: hashes and assertions.

`requires_grad=False` alone is not enough: transformers' `enable_input_require_grads` also hooks the patch embedding of
Qwen2-VL's tower, which then keeps its whole graph. So the tower and the aligner run under `no_grad`, and the first
output of each is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from noria.errors import TrainingError
from noria.modules import Architecture
from noria.records import Module

FROZEN: tuple[Module, ...] = ("vision_tower", "aligner")


def freeze(model: Any, architecture: Architecture) -> list[FrozenModule]:
    """Turns every gradient off and puts tower and aligner under `no_grad`. Returns the guards of their outputs."""
    model.requires_grad_(False)
    guards = []
    for path, module in _roots(model, architecture):
        module.forward = torch.no_grad()(module.forward)
        guards.append(FrozenModule(path, module))
    if not guards:
        raise TrainingError(f"no vision tower or aligner was found in {type(model).__name__}", code="not_frozen")
    return guards


class FrozenModule:
    """Watches what a frozen module hands on: `calls` counts it, and a tensor with a gradient ends the training."""

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.calls = 0
        self._handle = module.register_forward_hook(self._check)

    def remove(self) -> None:
        """Stops watching."""
        self._handle.remove()

    def _check(self, module: Any, args: Any, output: Any) -> None:
        self.calls += 1
        if any(tensor.requires_grad for tensor in _tensors(output)):
            raise TrainingError(f"{self.path} is frozen but its output carries a gradient", code="not_frozen")


def tensor_hashes(model: Any, architecture: Architecture) -> dict[str, str]:
    """`{"vision_tower": "sha256:..", "aligner": ".."}` over sorted (name, dtype, shape, bytes) of all their tensors."""
    named: dict[str, Any] = dict(model.named_parameters())
    return {
        module: _hash((name, value) for name, value in sorted(named.items()) if architecture.module_of(name) == module)
        for module in FROZEN
    }


def require_equal(before: dict[str, str], after: dict[str, str], what: str) -> None:
    """Raises TrainingError naming the frozen modules whose hashes differ."""
    changed = [
        f"{module} ({before[module]} -> {after.get(module)})"
        for module in before
        if before[module] != after.get(module)
    ]
    if changed:
        raise TrainingError(f"frozen modules changed {what}: {', '.join(changed)}", code="not_frozen")


def _hash(tensors: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def _roots(model: Any, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """The topmost modules that hold only tower, or only aligner, parameters."""
    for path, module in model.named_modules():
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        if not names:
            continue
        owners = {architecture.module_of(name) for name in names}
        parent = path.rpartition(".")[0]
        if owners <= set(FROZEN) and path and not _all_frozen(model, parent, architecture):
            yield path, module


def _all_frozen(model: Any, path: str, architecture: Architecture) -> bool:
    module = model.get_submodule(path)
    names = (f"{path}.{name}" if path else name for name, _ in module.named_parameters())
    return {architecture.module_of(name) for name in names} <= set(FROZEN)


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
