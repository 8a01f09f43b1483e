"""What deltas made of a master, in the few tensors that an eyes file has room for.

Comes in: a master in bfloat16, the delta folders of a lineage. Goes out: tensors. What such a file cannot express is
refused, never approximated; one thing is rounded, and only that: the LoRA's factors, from float32 to bfloat16.
Must not import transformers or peft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noria.errors import TrainingError
from noria.modules import architecture_of
from noria.records import Module
from train.export.checkpoint import NewTensor, TensorEntry, tensor_index
from train.export.gptq_format import to_new, to_torch
from train.methods.delta import Change, Factors, changed_weight, changes
from train.models.embedded.eyes.record import Lora

WHOLE: tuple[Module, ...] = ("vision_tower", "aligner")


@dataclass(frozen=True)
class Extracted:
    """Tower and aligner under the master's own names, LoRA factors under peft's; all in bfloat16."""

    tensors: tuple[NewTensor, ...]
    lora: Lora | None


def extract(master: Path, adapters: Sequence[Path]) -> Extracted:
    """Tower and aligner as merging would leave them, and the language model's LoRA.

    Raises TrainingError naming the weight that does not fit: a LoRA on tower or aligner, two LoRAs on one weight, a
    weight of the language model trained in full, LoRAs of several ranks or scales, a master that is not in bfloat16.
    """
    index = tensor_index(master)
    architecture = architecture_of(json.loads((master / "config.json").read_text()))
    together = changes(adapters, architecture)
    parted = architecture.partition(index, spelling="checkpoint")
    factors = {
        name: _only_factors(name, change)
        for name, change in sorted(together.items())
        if architecture.module_of(name) not in WHOLE
    }
    stored = {architecture.to_checkpoint(name, index): change for name, change in together.items()}
    names = sorted(name for module in WHOLE for name in parted[module])
    tensors = [_whole(index[name], stored.get(name)) for name in names]
    for name, one in factors.items():
        for side, entry in (("A", one.lora_a_RI), ("B", one.lora_b_OR)):
            tensors.append(_rounded(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight", entry))
    return Extracted(tuple(tensors), _lora(factors))


def _whole(entry: TensorEntry, change: Change | None) -> NewTensor:
    if entry.dtype != "BF16":
        raise TrainingError(f"{entry.name} is {entry.dtype} in the master; eyes are those of a master in bfloat16")
    weight = to_torch(entry)
    if change is None:
        return to_new(entry.name, weight)  # stored and never trained, like a norm that nothing reads
    if change.factors:
        raise TrainingError(f"{entry.name} has a LoRA; eyes hold tower and aligner whole: train them in full")
    return to_new(entry.name, changed_weight(entry.name, weight, change)[0])


def _only_factors(name: str, change: Change) -> Factors:
    if change.full is not None:
        raise TrainingError(f"{name} was trained in full; of the language model eyes hold a LoRA and nothing else")
    if len(change.factors) != 1:
        raise TrainingError(
            f"{name} has the LoRAs of {len(change.factors)} stages; eyes hold one: train the language model once"
        )
    return change.factors[0]


def _rounded(name: str, entry: TensorEntry) -> NewTensor:
    import torch

    return to_new(name, to_torch(entry).to(torch.bfloat16))


def _lora(factors: Mapping[str, Factors]) -> Lora | None:
    kinds = sorted({(one.lora_a_RI.shape[0], one.scale) for one in factors.values()})
    if len(kinds) > 1:
        told = ", ".join(f"rank {rank} with scale {scale:g}" for rank, scale in kinds)
        raise TrainingError(f"the language model's LoRAs differ ({told}); eyes hold one rank and one scale")
    if not kinds:
        return None
    rank, scale = kinds[0]
    return Lora(rank=rank, alpha=scale * rank, scale=scale, linears=len(factors))
