"""What a policy covers: the parameters that train in full and the linears that get a LoRA, module by module.

Comes in: a loaded transformers model, its row of the module map, each module's resolved policy. Goes out: a `Scope`
for each module, in transformers' names. Names are sorted by the map's whole prefixes, never by substring, and nothing
is ever "all linears" of the model. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from noria.errors import SettingsError, TrainingError
from noria.module_settings import ResolvedPolicy
from noria.modules import Architecture
from noria.records import Module


@dataclass(frozen=True)
class Scope:
    """One module. `parameters` is its number of weights; `full` and `linears` are names, in the model's order."""

    parameters: int
    full: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()


def scopes(model: Any, architecture: Architecture, policies: Mapping[Module, ResolvedPolicy]) -> dict[Module, Scope]:
    """Each module's scope, before any adapter is put in.

    What the model never reads (the tower's blocks behind `vision_feature_layer`, a norm after them) gets no gradient,
    so it is neither trained nor counted by `last_blocks`. Raises TrainingError (no such module), SettingsError
    (`last_blocks`, `targets` that the module does not have).
    """
    sizes = {name: _size(parameter) for name, parameter in model.named_parameters()}
    sizes |= {f"{path}.weight": module.in_features * module.out_features for path, module in _packed(model)}
    parted = architecture.partition(sizes)
    found = {}
    for module, policy in policies.items():
        names = parted[module]
        if not names:
            raise TrainingError(f"no {module} was found in {type(model).__name__}", code="no_targets")
        within = _within(module, names, architecture, policy, _read_blocks(model.config))
        full = tuple(name for name in names if policy.policy == "full" and within(name))
        linears = _linears(model, module, architecture) if policy.policy == "lora" else []
        found[module] = Scope(
            parameters=sum(sizes[name] for name in names),
            full=full,
            linears=_chosen(module, [path for path in linears if within(f"{path}.weight")], policy),
        )
    return found


def _linears(model: Any, module: Module, architecture: Architecture) -> list[str]:
    """A module's linears. The language model's are those of its decoder layers, which the map lists."""
    if module == "language_model":
        names = [f"{path}.weight" for path, _ in _packed(model)]
        return architecture.lm_linears([name for name, _ in model.named_parameters()] + names)
    plain = [path for path, one in model.named_modules() if type(one) is nn.Linear]
    return [path for path in plain if architecture.module_of(f"{path}.weight") == module]


def _chosen(module: Module, linears: list[str], policy: ResolvedPolicy) -> tuple[str, ...]:
    if policy.policy != "lora":
        return ()
    leaves = {path.rpartition(".")[2] for path in linears}
    unknown = sorted(set(policy.targets or ()) - leaves)
    if unknown or not linears:
        raise SettingsError(
            f"modules.{module}.targets={', '.join(unknown) or 'all'}: the {module} has no such linear; "
            f"its linears are {', '.join(sorted(leaves)) or 'none'}",
            param=f"modules.{module}.targets",
        )
    return tuple(path for path in linears if policy.targets is None or path.rpartition(".")[2] in policy.targets)


def _within(
    module: Module, names: Iterable[str], architecture: Architecture, policy: ResolvedPolicy, read: int | None
) -> Any:
    """A test of a name: does it lie in the part of the module that trains."""
    blocks = {number for name in names if (number := architecture.block_of(name)) is not None}
    depth = max(blocks, default=-1) + 1
    if module == "vision_tower" and read is not None and blocks:
        depth = min(depth, read if read >= 0 else depth + 1 + read)
    if policy.last_blocks is None:
        return lambda name: architecture.is_read(name) and (architecture.block_of(name) or 0) < max(depth, 1)
    if policy.last_blocks > depth:
        raise SettingsError(
            f"modules.{module}.last_blocks={policy.last_blocks}: the {module} has {depth} blocks that are read",
            param=f"modules.{module}.last_blocks",
        )
    last = range(depth - policy.last_blocks, depth)
    return lambda name: architecture.block_of(name) in last


def _read_blocks(config: Any) -> int | None:
    """How many of the tower's hidden states are read: `vision_feature_layer`, the furthest where it lists several."""
    layer = getattr(config, "vision_feature_layer", None)
    if isinstance(layer, (list, tuple)):  # only one sign occurs in a list
        return max(layer) if layer else None
    return layer if isinstance(layer, int) else None


def _packed(model: Any) -> list[tuple[str, Any]]:
    """Quantised linears, whose weight is no parameter."""
    return [(path, one) for path, one in model.named_modules() if hasattr(one, "qweight")]


def _size(parameter: Any) -> int:
    """Weights in a parameter; bitsandbytes packs two into a byte and remembers the shape."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
    return int(shape.numel())
