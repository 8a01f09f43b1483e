"""Frozen means frozen: modules without autograd and dropout, hashed before and after.

Comes in: a loaded transformers model, its architecture from the module map, who trains. Goes out: hashes and guards.

`requires_grad=False` alone is not enough: transformers' `enable_input_require_grads` also hooks the patch embedding of
Qwen2-VL's tower, which then keeps its whole graph. So a frozen tower runs under `no_grad`, a frozen aligner too where
no trained tower stands before it, and what each hands on is checked. Frozen modules stay in evaluation mode whatever
a trainer asks for, so that their dropout is off. Must not import `serve`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from noria.errors import TrainingError
from noria.module_settings import ResolvedPolicy
from noria.modules import Architecture
from noria.records import MODULES, Module


def without_autograd(policies: Mapping[Module, ResolvedPolicy]) -> tuple[Module, ...]:
    """The frozen modules that no gradient passes: those with nothing trained up to them. Pictures flow in this order:
    tower, aligner, language model."""
    passed = [module for module in MODULES if policies[module].trains]
    first = MODULES.index(passed[0]) if passed else len(MODULES)
    return MODULES[:first]


def freeze(model: Any, architecture: Architecture, policies: Mapping[Module, ResolvedPolicy]) -> list[FrozenModule]:
    """Turns every gradient of the model off and quiets the frozen modules. Returns the guards of their outputs.

    What trains is turned on again by whoever calls.
    """
    model.requires_grad_(False)
    for _, module in roots(model, architecture, [m for m in MODULES if not policies[m].trains]):
        _keep_quiet(module)
    guards = []
    for path, module in roots(model, architecture, without_autograd(policies)):
        module.forward = torch.no_grad()(module.forward)
        guards.append(FrozenModule(path, module))
    return guards


class FrozenModule:
    """Watches what a frozen module hands on: `calls` counts it, and a tensor with a graph behind it ends the training.

    A tensor that merely had its flag set by a hook (a leaf: `enable_input_require_grads` does this) is detached.
    """

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.calls = 0
        self._handle = module.register_forward_hook(self._check)

    def remove(self) -> None:
        """Stops watching."""
        self._handle.remove()

    def _check(self, module: Any, args: Any, output: Any) -> None:
        self.calls += 1
        for tensor in _tensors(output):
            if tensor.requires_grad and not tensor.is_leaf:
                raise TrainingError(f"{self.path} is frozen but its output carries a gradient", code="not_frozen")
            tensor.requires_grad_(False)


def roots(model: Any, architecture: Architecture, modules: Collection[Module]) -> Iterator[tuple[str, Any]]:
    """The topmost submodules that are called and hold parameters of the given modules only.

    A list of blocks is never called itself: its blocks are.
    """
    yield from _roots("", model, architecture, set(modules))


def _roots(path: str, module: nn.Module, architecture: Architecture, wanted: set[Module]) -> Iterator[tuple[str, Any]]:
    owners = {architecture.module_of(f"{path}.{name}" if path else name) for name, _ in module.named_parameters()}
    if not owners & wanted:
        return
    if path and owners <= wanted and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _roots(f"{path}.{name}" if path else name, child, architecture, wanted)


def _keep_quiet(root: Any) -> None:
    """Evaluation mode for good. A layer that is to be computed again on the way back needs to think that it trains;
    what is inside it does not."""

    def train(mode: bool = True) -> Any:
        for module in root.modules():
            again = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
            module.training = mode and again
        return root

    root.train = train
    train(root.training)


def tensor_hashes(
    model: Any, architecture: Architecture, modules: Collection[Module] = ("vision_tower", "aligner")
) -> dict[Module, str]:
    """`{"vision_tower": "sha256:..", ..}` over sorted (name, dtype, shape, bytes) of all tensors of some modules."""
    named: dict[str, Any] = dict(model.named_parameters())
    return {
        module: _hash((name, value) for name, value in sorted(named.items()) if architecture.module_of(name) == module)
        for module in MODULES
        if module in modules
    }


def require_equal(before: Mapping[Module, str], after: Mapping[Module, str], what: str) -> None:
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


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
