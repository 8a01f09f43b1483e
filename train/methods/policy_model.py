"""The policy that a method trains: the master with its lineage's adapters folded in, ready for a new LoRA.

Comes in: a full-precision checkpoint folder and adapter folders. Goes out: model, processor, LoRA configuration; and,
after training, the new adapter's folder. Must not import `serve`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from noria.errors import TrainingError
from noria.modules import Architecture, architecture_of
from noria.settings import LoraSettings


def read_architecture(checkpoint: Path) -> Architecture:
    """The checkpoint's row in the module map. Raises TrainingError without a config, UnsupportedModel if unknown."""
    config = checkpoint / "config.json"
    if not config.is_file():
        raise TrainingError(f"no master: {checkpoint} has no config.json", code="no_master")
    return architecture_of(json.loads(config.read_text()))


def load_processor(checkpoint: Path) -> Any:
    """The checkpoint's processor: chat template, tokenizer, pictures."""
    return transformers.AutoProcessor.from_pretrained(checkpoint)


def training_dtype() -> torch.dtype:
    """bfloat16 weights on a GPU, float32 on a CPU.

    On two cores with matrix units a step of four pairs on 135M parameters took 4.5 to 7 s in either, and bfloat16 lost
    half of the margin to rounding in the first steps (0.18 against 0.38 at the third).
    """
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_policy(master: Path, adapters: Sequence[Path], architecture: Architecture, dtype: torch.dtype) -> Any:
    """The merged parent in memory: master plus every adapter up the lineage.

    As in `train.export.merge` the adapters' sum is taken in float32 and rounded once.
    """
    loader = getattr(transformers, architecture.auto_class)
    model = loader.from_pretrained(master, dtype=dtype, trust_remote_code=False)
    weights = dict(model.named_parameters())
    deltas: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for name, delta_OI in _adapter_deltas(adapter):
            deltas[name] = deltas[name] + delta_OI if name in deltas else delta_OI
    for name, delta_OI in deltas.items():
        if name not in weights:
            raise TrainingError(f"an adapter of the lineage changes {name}, which the master does not have")
        weight = weights[name]
        weight.data.copy_(weight.data.float() + delta_OI)
    return model


def _adapter_deltas(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of a weight and what one adapter adds to it, (alpha / r) B A, in float32."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, lora_a_RI in tensors.items():
        if ".lora_A." in name:
            lora_b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            yield target, (lora_b_OR.float() @ lora_a_RI.float()) * (config["lora_alpha"] / config["r"])


def lora_config(model: Any, architecture: Architecture, settings: LoraSettings) -> LoraConfig:
    """LoRA on the language model's decoder linears, each named in full from the module map."""
    linears = architecture.lm_linears([name for name, _ in model.named_parameters()], "hf")
    targets = sorted(name.removesuffix(".weight") for name in linears)
    if not targets:
        raise TrainingError(f"no decoder linears were found in {type(model).__name__}", code="no_targets")
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=targets,
    )


def save_adapter(model: Any, out: Path, targets: Sequence[str]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (float32), the same bytes for the same weights.

    peft shortens the list of targets and keeps it as a set, whose order changes from process to process; here the full
    names are written in order.
    """
    out.mkdir(parents=True)
    config = model.peft_config["default"].to_dict()
    config.update(target_modules=sorted(targets), base_model_name_or_path=None, inference_mode=True)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (out / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    tensors = {
        name.replace(".default.", "."): value.detach().float().cpu().contiguous()
        for name, value in sorted(model.named_parameters())
        if ".lora_" in name
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
