"""Looks at every byte of a policy adapter before the engine sees one.

Comes in: a folder with peft's `adapter_config.json` and `adapter_model.safetensors`, and the `serving/` folder of the
version beside which it will be loaded. Goes out: the adapter's rank, or an InvalidRequest that names what is wrong.
Blocking: run it in a thread. Must not import torch or vllm.

vLLM 0.31 takes in silence: a factor of the wrong shape, a NaN, a `rank_pattern` or `alpha_pattern` (it reads one rank
and one alpha for all linears), biases and whole modules beside the factors. Each is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noria.errors import IntegrityError, InvalidRequest
from noria.modules import Architecture, architecture_of
from noria.records import Json
from serve.release.validate import TensorEntry, check_finite, read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number."""
HEADER_BYTES = 16 * 2**20  # room for the names and shapes of every factor
_FACTOR = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_(?P<side>[AB])\.weight")
_NOT_PLAIN = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class Linears:
    """The linears that an adapter may change: transformers' name -> (output features, input features)."""

    shapes: Mapping[str, tuple[int, int]]

    def most_bytes(self, rank: int) -> int:
        """The largest file of an adapter of that rank on all of them, in float32."""
        return HEADER_BYTES + 4 * rank * sum(outputs + inputs for outputs, inputs in self.shapes.values())


def linears_of(serving: Path) -> Linears:
    """The language model's linears of a served checkpoint, quantised by GPTQ or not. Raises UnsupportedModel."""
    config = json.loads((serving / "config.json").read_text())
    architecture = architecture_of(config)
    tensors = read_tensors(serving)
    bits = int((config.get("quantization_config") or {}).get("bits", 4))
    found = {}
    for linear in architecture.lm_linears(tensors, "checkpoint"):
        found[_in_transformers(linear, architecture)] = _shape(linear, tensors, bits)
    return Linears(found)


def check_adapter(folder: Path, linears: Linears, max_rank: int) -> int:
    """The adapter's rank. Raises InvalidRequest unless the engine can load it beside that version as it is meant."""
    rank = _check_config(folder / CONFIG, max_rank)
    try:
        tensors = read_tensors(folder)
        _check_tensors(tensors, linears, rank)
        for name, entry in tensors.items():
            check_finite(name, entry)
    except IntegrityError as error:
        raise InvalidRequest(f"the adapter: {error.message}", param=error.param) from error
    return rank


def _check_config(path: Path, max_rank: int) -> int:
    try:
        config: Json = json.loads(path.read_bytes())
        rank, alpha = config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _wrong(f"it is not peft's configuration of a LoRA ({type(error).__name__}: {error})", CONFIG) from error
    not_plain = [key for key in _NOT_PLAIN if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or not_plain:
        what = ", ".join(not_plain) or "peft_type or bias"
        raise _wrong(f"{what}: a policy adapter is a plain LoRA with one rank and one alpha", CONFIG)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _wrong(f"r is {rank!r}, not a rank", "r")
    if rank > max_rank:
        raise _wrong(f"its rank is {rank}, and the server was started for {max_rank} (engine.policy_rank)", "r")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise _wrong(f"lora_alpha is {alpha!r}, not a positive number", "lora_alpha")
    if not config.get("target_modules"):
        raise _wrong("it has no target_modules", "target_modules")
    return rank


def _check_tensors(tensors: Mapping[str, TensorEntry], linears: Linears, rank: int) -> None:
    sides: dict[str, set[str]] = {}
    for name, entry in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise _wrong(f"tensor {name} is no factor of a LoRA as peft names them", name)
        shape = linears.shapes.get(match["linear"])
        if shape is None:
            raise _wrong(f"{match['linear']} is no linear of the served language model; only those may change", name)
        outputs, inputs = shape
        wanted = (rank, inputs) if match["side"] == "A" else (outputs, rank)
        if entry.shape != wanted:
            raise _wrong(f"tensor {name} has shape {list(entry.shape)}, {list(wanted)} is needed", name)
        if entry.dtype not in DTYPES:
            raise _wrong(f"tensor {name} is {entry.dtype}, not one of {', '.join(DTYPES)}", name)
        if entry.end - entry.begin != wanted[0] * wanted[1] * DTYPES[entry.dtype]:
            raise _wrong(f"tensor {name} has {entry.end - entry.begin} bytes, too few or too many for its shape", name)
        sides.setdefault(match["linear"], set()).add(match["side"])
    for linear, found in sides.items():
        if len(found) != 2:
            raise _wrong(f"{linear} has lora_{found.pop()} alone", linear)
    if not sides:
        raise _wrong("it holds no tensor", WEIGHTS)


def _in_transformers(linear: str, architecture: Architecture) -> str:
    """transformers' name of a linear of the decoder that a checkpoint spells in its own way."""
    spelled = [(prefix, part.hf) for part in architecture.parts if part.decoder for prefix in part.checkpoint]
    for prefix, hf in sorted(spelled, key=lambda pair: -len(pair[0])):
        if linear.startswith(prefix):
            return hf + linear.removeprefix(prefix)
    raise InvalidRequest(f"{linear} is in no part of {architecture.name}", param=linear)


def _shape(linear: str, tensors: Mapping[str, TensorEntry], bits: int) -> tuple[int, int]:
    plain = tensors.get(f"{linear}.weight")
    if plain is not None:
        return plain.shape[0], plain.shape[1]
    packed = tensors[f"{linear}.qweight"].shape  # inputs are packed along the first axis, 32 / bits to a word
    return packed[1], packed[0] * 32 // bits


def _wrong(what: str, param: Any) -> InvalidRequest:
    return InvalidRequest(f"the adapter: {what}", param=str(param), code="invalid_adapter")
