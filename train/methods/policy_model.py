"""The policy that a method trains: the master with its lineage's deltas folded in, or a 4-bit stand-in for it.

Comes in: a full-precision checkpoint folder and delta folders. Goes out: model and processor. Must not import `serve`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from noria.errors import TrainingError
from noria.modules import Architecture, architecture_of
from train.methods.delta import apply_deltas
from train.methods.quantized_base import load_gptq, to_nf4

Base = Literal["master", "gptq", "bitsandbytes"]


def read_architecture(checkpoint: Path) -> Architecture:
    """The checkpoint's row in the module map. Raises TrainingError without a config, UnsupportedModel if unknown."""
    config = checkpoint / "config.json"
    if not config.is_file():
        raise TrainingError(f"no master: {checkpoint} has no config.json", code="no_master")
    return architecture_of(json.loads(config.read_text()))


def load_processor(checkpoint: Path) -> Any:
    """The checkpoint's processor: chat template, tokenizer, pictures."""
    return transformers.AutoProcessor.from_pretrained(  # nosec B615
        checkpoint, trust_remote_code=False, local_files_only=True
    )


def training_dtype() -> torch.dtype:
    """bfloat16 weights on a GPU, float32 on a CPU.

    On two cores with matrix units a step of four pairs on 135M parameters took 4.5 to 7 s in either, and bfloat16 lost
    half of the margin to rounding in the first steps (0.18 against 0.38 at the third).
    """
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_policy(
    master: Path,
    adapters: Sequence[Path],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    base: Base = "master",
    serving: Path | None = None,
    attention: str | None = None,
) -> Any:
    """The merged parent in memory: master plus every delta up the lineage, exactly as `train.export.merge` writes it.

    `base` "gptq" takes the language model's linears from `serving` instead, the parent's own 4-bit checkpoint, which
    holds the lineage already; "bitsandbytes" quantises the merged ones to NF4 and puts the model on the GPU.
    `attention` is transformers' `attn_implementation`, for a whole base; none is its own choice. Raises TrainingError
    when a delta does not fit, a 4-bit base is not there or cannot run here.
    """
    if base == "gptq":
        if serving is None:
            raise TrainingError("train.base='gptq': the parent has no serving checkpoint to learn on", code="no_base")
        return load_gptq(serving, architecture, dtype)
    loader = getattr(transformers, architecture.auto_class)
    more = {"attn_implementation": attention} if attention else {}
    model = loader.from_pretrained(master, dtype=dtype, trust_remote_code=False, **more)
    apply_deltas(model, adapters)
    if base == "bitsandbytes":
        to_nf4(model, architecture, dtype)
    return model
