"""Folds the deltas of a lineage into their master, on disk.

Comes in: a full-precision checkpoint folder and delta folders (`train.methods.delta`), oldest first. Goes out: a
checkpoint folder with the same files, names, shapes and dtypes, in which only what the deltas trained differs: linears
with a LoRA, parameters trained in full, of whichever module.
Files are copied and then changed in place, one tensor in memory at a time; the folder appears by one rename. Each
tensor is rounded to the master's dtype once.
Must not import transformers or peft.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noria.errors import TrainingError
from noria.modules import Architecture, architecture_of
from noria.records import Json, Module
from train.export.checkpoint import (
    TensorEntry,
    copy_side_files,
    fsync_tree,
    read_bytes,
    tensor_index,
    weight_files,
)
from train.export.gptq_format import to_new, to_torch
from train.methods.delta import Change, changed_weight, changes, delta_folders

_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, counted in deltas and tensors. `merged` got a LoRA, `replaced` were trained in full.

    `max_update` is the largest absolute change of any weight before rounding.
    """

    adapters: int
    merged: int
    replaced: int
    tensors: int
    max_update: float


def merge(
    master: Path,
    deltas: Sequence[Path],
    out: Path,
    check: Callable[[], None] = lambda: None,
    *,
    parent: Path | None = None,
    frozen: Collection[Module] = (),
) -> MergeReport:
    """Writes the merged checkpoint to `out`, which must not exist. `check` is called per tensor and may raise to stop.

    `parent` is the folder that the lineage's last version serves from: what earlier deltas made of a `frozen` tower or
    aligner is copied from there. Another machine's B A may differ in a last bit, and frozen means the same bytes.
    Raises TrainingError when a delta fits no tensor of the master, changes a module that it calls frozen, is of a kind
    that a sum of B A cannot express, or holds a number that is not finite.
    """
    config = json.loads((master / "config.json").read_text())
    arch, index = architecture_of(config), tensor_index(master)
    together = changes(deltas, arch)
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_side_files(master, staging)
    for file in [*weight_files(master), *master.glob("*.safetensors.index.json")]:
        shutil.copyfile(file, staging / file.name)
    largest, kept = 0.0, _kept(parent, arch, frozen)
    for name, change in sorted(together.items()):
        for entry in _stored_as(name, together, arch, index, config):
            check()
            largest = max(largest, _apply(entry, staging / entry.file.name, change, kept.get(entry.name)))
    fsync_tree(staging)
    staging.rename(out)
    return MergeReport(
        adapters=len(delta_folders(*deltas)) if deltas else 0,
        merged=sum(bool(change.factors) for change in together.values()),
        replaced=sum(change.full is not None for change in together.values()),
        tensors=len(index),
        max_update=largest,
    )


def _stored_as(
    name: str, together: Mapping[str, Change], arch: Architecture, index: Mapping[str, TensorEntry], config: Json
) -> list[TensorEntry]:
    """The tensors that a parameter is stored as: one, or two where files keep tied embeddings twice.

    transformers 5 unties an output layer whose bytes are not the input embedding's, so both get the change.
    """
    entry = index[arch.to_checkpoint(name, index)]
    if entry.dtype not in _FLOATS:
        raise TrainingError(f"{entry.name} is {entry.dtype}: a delta is folded into full precision only")
    head = "lm_head.weight"
    tied = config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings")
    if not tied or not name.endswith(".embed_tokens.weight") or head in together:
        return [entry]
    twins = [index[one] for part in arch.parts if part.hf == "lm_head." for one in _spelled(part.checkpoint, index)]
    return [entry, *(twin for twin in twins if read_bytes(twin) == read_bytes(entry))]


def _spelled(prefixes: Sequence[str], index: Mapping[str, TensorEntry]) -> list[str]:
    return [f"{prefix}weight" for prefix in prefixes if f"{prefix}weight" in index]


def _kept(parent: Path | None, arch: Architecture, frozen: Collection[Module]) -> dict[str, TensorEntry]:
    """The parent's tensors of frozen modules; the language model's are quantised there."""
    if parent is None:
        return {}
    index = tensor_index(parent)
    parted = arch.partition(index, spelling="checkpoint")
    return {name: index[name] for module in frozen if module != "language_model" for name in parted[module]}


def _apply(entry: TensorEntry, file: Path, change: Change, kept: TensorEntry | None) -> float:
    """Changes one tensor of a copied file; returns the largest absolute change before rounding."""
    merged, moved = changed_weight(entry.name, to_torch(entry), change)
    if kept is not None and (kept.dtype, kept.shape) != (entry.dtype, entry.shape):
        raise TrainingError(f"{kept.file} holds {kept.name} as {kept.dtype}{list(kept.shape)}, the master does not")
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        stream.write(to_new(entry.name, merged).data if kept is None else read_bytes(kept))
    return moved
