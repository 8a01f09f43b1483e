"""Puts module policies on a loaded model: who trains, at which rate, and the proof that it is so.

Comes in: a plain transformers model, its row of the module map, each module's resolved policy.
Goes out: `Applied`: the same model with LoRA put in place, gradients on for exactly what trains, frozen modules without
autograd and dropout, the optimiser's parameter groups, the table to print, and the checks. A trainer does:

    applied = apply_policies(model, architecture, policies)   # after seeding: LoRA's A is drawn here
    print(applied.table())
    optimizer = applied.optimizer(torch.optim.AdamW, betas=(0.9, 0.95))
    applied.require_covered(optimizer)                        # once more if the trainer made its own
    ...train, under autocast to bfloat16 where `applied.mixed`...
    applied.require_frozen()                                  # hashes as before, and the tower ran without a graph
    save_delta(applied.model, out, applied.policies)          # train.methods.delta

Must not import `serve`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from noria.errors import TrainingError
from noria.module_settings import ResolvedPolicy
from noria.modules import Architecture
from noria.records import MODULES, Module
from train.methods import frozen
from train.methods.frozen import FrozenModule
from train.methods.policies.checkpointing import checkpoint_modules, checkpointing_off
from train.methods.policies.scope import Scope, scopes
from train.methods.quantized_base import GptqLinear

ADAPTER = "default"  # peft's name of the adapter that is trained


@dataclass(frozen=True)
class Row:
    """One module's line of the table. `parameters` counts the model's own weights, `trainable` LoRA's too."""

    module: Module
    policy: str
    parameters: int
    trainable: int
    learning_rate: float


@dataclass
class Applied:
    """A model whose policies are in force. `groups` are AdamW's parameter groups, each with its `module`.

    `mixed`: parameters that train in full were raised to float32 above a model of lower precision, so forward passes
    need autocast. `frozen_hashes` are those of the frozen modules' tensors when the policies were applied.
    """

    model: Any
    architecture: Architecture
    policies: Mapping[Module, ResolvedPolicy]
    scopes: Mapping[Module, Scope]
    groups: list[dict[str, Any]]
    rows: tuple[Row, ...]
    guards: list[FrozenModule]
    mixed: bool
    frozen_hashes: dict[Module, str] = field(default_factory=dict)

    @property
    def trains_in_full(self) -> bool:
        """Whether weights of the model itself change, so that switching LoRA off does not give the model before."""
        return any(scope.full for scope in self.scopes.values())

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(row.trainable for row in self.rows)

    def table(self) -> str:
        """Each module's policy, parameters, trainable ones and peak learning rate, as text to print."""
        head = ("module", "policy", "parameters", "trainable", "learning rate")
        lines = [head] + [
            (
                r.module,
                r.policy,
                f"{r.parameters:,}",
                f"{r.trainable:,}",
                f"{r.learning_rate:g}" if r.trainable else "-",
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def optimizer(self, make: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
        """An optimiser over the groups; `options` must not name a learning rate or a weight decay: groups have both."""
        made = make(self.groups, **options)
        self.require_covered(made)
        return made

    def require_covered(self, optimizer: Any) -> None:
        """Raises TrainingError unless the optimiser holds every trainable parameter once and no frozen one."""
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self.model.named_parameters()}
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        if missing := [names[one] for one in trainable if one not in set(held)]:
            raise TrainingError(
                f"the optimiser does not hold {len(missing)} trainable parameters: {', '.join(sorted(missing)[:5])}",
                code="not_in_optimizer",
            )
        wrong = [names.get(one, "a tensor that is not the model's") for one in held if one not in trainable]
        wrong += [name for name in map(names.get, held) if name and not self._may_train(name)]
        if wrong:
            raise TrainingError(
                f"the optimiser holds parameters that are frozen: {', '.join(sorted(set(wrong))[:5])}",
                code="not_frozen",
            )
        if len(held) != len(set(held)):
            raise TrainingError("the optimiser holds a parameter twice", code="not_in_optimizer")

    def require_frozen(self, pictures: bool = True) -> None:
        """Raises TrainingError when a frozen module's tensors changed, or pictures never went through its guards."""
        if pictures and self.guards and not any(guard.calls for guard in self.guards):
            raise TrainingError("pictures were trained on but the vision tower never ran", code="not_frozen")
        frozen.require_equal(self.frozen_hashes, self.hashes(), "during training")

    def hashes(self) -> dict[Module, str]:
        """Hashes of the frozen modules' tensors as they are now."""
        return frozen.tensor_hashes(self.model, self.architecture, list(self.frozen_hashes))

    def set_dropout(self) -> None:
        """Sets the adapters' dropout to what the policies ask, also after a trainer switched every dropout off."""
        for module, scope in self.scopes.items():
            for path in scope.linears:
                drop = self.model.get_submodule(path).lora_dropout[ADAPTER]
                if isinstance(drop, nn.Dropout):
                    drop.p = self.policies[module].dropout

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model without its LoRA and without checkpointing: the reference, where nothing trains in full."""
        layers = [one for one in self.model.modules() if isinstance(one, BaseTunerLayer)]
        with checkpointing_off(self.model):
            try:
                for layer in layers:
                    layer.enable_adapters(False)
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)

    def _may_train(self, name: str) -> bool:
        scope = self.scopes[self.architecture.module_of(name)]
        if ".lora_" in name:
            return name.partition(".lora_")[0] in scope.linears
        return name in scope.full


def apply_policies(
    model: Any,
    architecture: Architecture,
    policies: Mapping[Module, ResolvedPolicy],
    *,
    checkpointing: bool | None = None,
) -> Applied:
    """Freezes, puts LoRA in place, turns gradients on, and returns what a trainer needs; the model is changed in place.

    `checkpointing` is for the modules that do not say whether their blocks are computed again on the way back; none
    is yes on a GPU. Seed before: LoRA's A is drawn here. Raises SettingsError and TrainingError, as `scopes`.
    """
    found = scopes(model, architecture, policies)
    guards = frozen.freeze(model, architecture, policies)
    _put_lora(model, found, policies)
    mixed = _turn_on(model, found)
    passed = [module for module in MODULES if module not in frozen.without_autograd(policies)]
    default = torch.cuda.is_available() if checkpointing is None else checkpointing
    wanted = {m: policies[m].gradient_checkpointing for m in passed}
    checkpoint_modules(model, architecture, [m for m, asked in wanted.items() if (default if asked is None else asked)])
    groups = _groups(model, architecture, policies)
    still = [module for module in MODULES if not policies[module].trains]
    applied = Applied(
        model=model,
        architecture=architecture,
        policies=policies,
        scopes=found,
        groups=groups,
        rows=tuple(_row(module, policies[module], found[module], groups) for module in MODULES),
        guards=guards,
        mixed=mixed,
        frozen_hashes=frozen.tensor_hashes(model, architecture, still),
    )
    applied.set_dropout()
    return applied


def lora_config(found: Mapping[Module, Scope], policies: Mapping[Module, ResolvedPolicy]) -> LoraConfig | None:
    """One peft configuration for every module's LoRA, each linear named in full; None where there is none."""
    owners = {path: policies[module] for module, scope in found.items() for path in scope.linears}
    if not owners:
        return None
    first = next(iter(owners.values()))
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=max(policy.dropout for policy in owners.values()),  # set for each module by `set_dropout`
        bias="none",
        target_modules=list(owners),
        rank_pattern={re.escape(p): o.rank for p, o in owners.items() if o.rank != first.rank},
        alpha_pattern={re.escape(p): o.alpha for p, o in owners.items() if o.alpha != first.alpha},
    )


def _put_lora(model: Any, found: Mapping[Module, Scope], policies: Mapping[Module, ResolvedPolicy]) -> None:
    config = lora_config(found, policies)
    if config is None:
        return
    config._register_custom_module({GptqLinear: GPTQLoraLinear})  # peft's LoRA over a frozen linear of any kind
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Unsupported layer type.*GptqLinear")  # it is told above
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # peft makes them in the base's dtype, where small steps would be rounded away
            parameter.data = parameter.data.float()


def _turn_on(model: Any, found: Mapping[Module, Scope]) -> bool:
    """Gradients on for what trains in full, in float32. Whether that is above the model's precision."""
    full = {name for scope in found.values() for name in scope.full}
    raised = False
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
        elif name in full:
            raised |= parameter.dtype in (torch.bfloat16, torch.float16)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return raised


def _groups(model: Any, architecture: Architecture, policies: Mapping[Module, ResolvedPolicy]) -> list[dict[str, Any]]:
    """Parameter groups: one a module, the language model's first, and biases and norms apart where it decays."""
    sorted_out: dict[tuple[Module, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = architecture.module_of(name)
            spared = parameter.ndim < 2 and policies[module].weight_decay > 0
            sorted_out.setdefault((module, spared), []).append(parameter)
    return [
        {
            "params": sorted_out[module, spared],
            "lr": policies[module].learning_rate,
            "weight_decay": 0.0 if spared else policies[module].weight_decay,
            "module": module,
        }
        for module in reversed(MODULES)
        for spared in (False, True)
        if (module, spared) in sorted_out
    ]


def _row(module: Module, policy: ResolvedPolicy, scope: Scope, groups: Sequence[Mapping[str, Any]]) -> Row:
    trainable = sum(p.numel() for group in groups if group["module"] == module for p in group["params"])
    part = f" (last {policy.last_blocks} blocks)" if policy.last_blocks else ""
    rank = f" r={policy.rank}" if policy.policy == "lora" else ""
    return Row(module, policy.policy + rank + part, scope.parameters, trainable, policy.learning_rate)
