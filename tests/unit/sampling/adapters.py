"""Small checkpoints and LoRAs on them: what an upload is made of.

Comes in: a folder. Goes out: a served checkpoint of two GPTQ linears, and adapters in peft's files and in the wire's
framing. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from noria.records import Json

Q, DOWN = "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.down_proj"
SHAPES = {Q: (48, 32), DOWN: (32, 64)}  # output and input features
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "language_model.model.layers.0.self_attn.q_proj.qweight": np.zeros((4, 48), dtype=np.int32),
    "language_model.model.layers.0.self_attn.q_proj.scales": np.ones((1, 48), dtype=np.float16),
    "language_model.model.layers.0.mlp.down_proj.weight": np.ones((32, 64), dtype=np.float16),
    "language_model.model.norm.weight": np.ones((32,), dtype=np.float32),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((8, 8), dtype=np.float32),
}
CONFIG: Json = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama"},
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32},
}


def write_serving(folder: Path) -> Path:
    """A served checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(TENSORS, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def factors(rank: int = 2, value: float = 0.5) -> dict[str, np.ndarray[Any, Any]]:
    """Both factors of both linears."""
    out = {}
    for linear, (outputs, inputs) in SHAPES.items():
        out[f"base_model.model.{linear}.lora_A.weight"] = np.full((rank, inputs), value, dtype=np.float32)
        out[f"base_model.model.{linear}.lora_B.weight"] = np.full((outputs, rank), value, dtype=np.float32)
    return out


def config(**changes: Any) -> Json:
    """peft's configuration."""
    plain: Json = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    return {**plain, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, **changes}


def upload(
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None, configuration: Json | bytes | None = None
) -> bytes:
    """An adapter as the wire frames it."""
    said = config() if configuration is None else configuration
    head = said if isinstance(said, bytes) else json.dumps(said).encode()
    body: bytes = save(dict(factors() if tensors is None else tensors))
    return len(head).to_bytes(8, "little") + head + body


def write_adapter(folder: Path, value: float = 0.5) -> Path:
    """An adapter as peft leaves it on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config()))
    (folder / "adapter_model.safetensors").write_bytes(save(factors(value=value)))
    return folder


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    """The bytes in pieces."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
