"""Folds the LoRA adapters of a lineage into their master.

Comes in: a full-precision checkpoint folder and peft adapter folders, oldest first. Goes out: a checkpoint folder with
the same files, names, shapes and dtypes, in which only the adapted linears of the language model differ.
Files are copied and then changed in place, one tensor in memory at a time; the folder appears by one rename.
The sum over all adapters is taken in float32 and rounded once, W' = round(W + sum_i s_i B_i A_i), with
s = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
Must not import transformers or peft.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import TrainingError
from noria.modules import Architecture, architecture_of
from train.export.checkpoint import TensorEntry, copy_side_files, fsync_tree, tensor_index, weight_files
from train.export.gptq_format import to_new, to_torch

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")
_REFUSED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "trainable_token_indices")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `max_update` is the largest absolute change of any weight before rounding."""

    adapters: int
    merged: int
    tensors: int
    max_update: float


@dataclass(frozen=True)
class _Update:
    """One adapter's part in one linear: scale * B A. `lora_a_RI` and `lora_b_OR` are where the factors lie."""

    lora_a_RI: TensorEntry
    lora_b_OR: TensorEntry
    scale: float


def merge(master: Path, adapters: list[Path], out: Path, check: Callable[[], None] = lambda: None) -> MergeReport:
    """Writes the merged checkpoint to `out`, which must not exist. `check` is called per linear and may raise to stop.

    Raises TrainingError when an adapter reaches outside the language model, fits no tensor of the master, is of a kind
    that a sum of B A cannot express, or holds a number that is not finite.
    """
    arch = architecture_of(json.loads((master / "config.json").read_text()))
    index = tensor_index(master)
    updates: dict[str, list[_Update]] = {}
    for adapter in adapters:
        for name, update in _read_adapter(adapter, arch, index).items():
            updates.setdefault(name, []).append(update)
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_side_files(master, staging)
    for file in weight_files(master):
        shutil.copyfile(file, staging / file.name)
    for side in master.glob("*.safetensors.index.json"):
        shutil.copyfile(side, staging / side.name)
    largest = 0.0
    for name in sorted(updates):
        check()
        largest = max(largest, _apply(index[name], staging / index[name].file.name, updates[name]))
    fsync_tree(staging)
    staging.rename(out)
    return MergeReport(len(adapters), len(updates), len(index), largest)


def _read_adapter(folder: Path, arch: Architecture, index: Mapping[str, TensorEntry]) -> dict[str, _Update]:
    config = json.loads((folder / "adapter_config.json").read_text())
    wrong = [key for key in _REFUSED if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or wrong:
        raise TrainingError(f"the adapter in {folder} is not a plain LoRA ({', '.join(wrong) or 'type or bias'})")
    factors: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensor_index(folder).items():
        match = _KEY.match(name)
        if match is None:
            raise TrainingError(f"the adapter in {folder} has a tensor that no LoRA linear explains: {name}")
        factors.setdefault(match["module"], {})[match["side"]] = entry
    updates = {}
    for module, sides in factors.items():
        if not arch.lm_linears([f"{module}.weight"]):
            raise TrainingError(f"the adapter in {folder} changes {module}, which is no linear of the language model")
        target = arch.to_checkpoint(f"{module}.weight", index)
        updates[target] = _update(module, sides, config, index[target])
    return updates


def _update(module: str, sides: Mapping[str, TensorEntry], config: Mapping[str, Any], target: TensorEntry) -> _Update:
    if set(sides) != {"A", "B"}:
        raise TrainingError(f"the adapter holds only half of {module}: lora_{', '.join(sides)}")
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    (rank_a, inputs), (outputs, rank_b) = sides["A"].shape, sides["B"].shape
    if rank_a != rank or rank_b != rank or (outputs, inputs) != target.shape:
        raise TrainingError(
            f"the adapter's {module} is {outputs}x{rank_b} by {rank_a}x{inputs} at rank {rank}; "
            f"the master's weight is {target.shape}"
        )
    return _Update(sides["A"], sides["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A value of peft's `rank_pattern` or `alpha_pattern`: the first whose regex ends the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"^(.*\.)?({pattern})$", module):
            return value
    return default


def _apply(entry: TensorEntry, file: Path, updates: list[_Update]) -> float:
    """Adds the updates to one tensor of a copied file; returns the largest absolute change before rounding."""
    import torch

    weight = to_torch(entry)
    delta_OI = torch.zeros(weight.shape, dtype=torch.float32)
    for update in updates:
        a_RI, b_OR = to_torch(update.lora_a_RI).float(), to_torch(update.lora_b_OR).float()
        delta_OI += (b_OR @ a_RI) * update.scale
    if not bool(torch.isfinite(delta_OI).all()):
        raise TrainingError(f"the adapters' update of {entry.name} is not finite")
    merged: torch.Tensor = (weight.float() + delta_OI).to(weight.dtype)
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        stream.write(to_new(entry.name, merged).data)
    return float(delta_OI.abs().max())
