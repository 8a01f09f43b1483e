"""Round-to-nearest into the GPTQ checkpoint format: a quantised tiny model in a second, for tests of serving.

Comes in: a full-precision HF checkpoint folder. Goes out: the same folder with the language model's linears as
`qweight`, `qzeros`, `scales` and `g_idx`, every other tensor and file as it was. No calibration: nothing here is
about quality. Must not import vllm.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"(^|\.)layers\.\d+\..*\.?(q|k|v|o|gate|up|down)_proj\.weight$")
BITS = 4
GROUP_SIZE = 32


def pack_linear(weight_OI: torch.Tensor, group_size: int = GROUP_SIZE) -> dict[str, torch.Tensor]:
    """One linear's four GPTQ tensors (4 bits, symmetric, no act-order, the format's `zero - 1` kept).

    O, I are output and input features; I must be a multiple of `group_size`, both multiples of 8.
    """
    outputs, inputs = weight_OI.shape
    groups = inputs // group_size
    weight_GSO = weight_OI.float().t().reshape(groups, group_size, outputs)
    scales_GO = (weight_GSO.abs().amax(dim=1) / 7).clamp(min=1e-8).to(torch.float16)
    codes_GSO = torch.clamp(torch.round(weight_GSO / scales_GO.float()[:, None]) + 8, 0, 15)
    codes_IO = codes_GSO.reshape(inputs, outputs).to(torch.int64)
    shifts = torch.arange(0, 32, BITS, dtype=torch.int64)
    packed = (codes_IO.reshape(inputs // 8, 8, outputs) << shifts[None, :, None]).sum(dim=1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return {
        "qweight": packed.to(torch.int32).contiguous(),
        "qzeros": torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": scales_GO.contiguous(),
        "g_idx": (torch.arange(inputs, dtype=torch.int32) // group_size).contiguous(),
    }


def quantize_rtn(source: Path, out: Path) -> None:
    """Writes `out`, a complete GPTQ checkpoint made of `source` (one or more safetensors files, config, tokenizer)."""
    shutil.copytree(source, out)
    for file in sorted(out.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            if LINEAR.search(name) and "vision" not in name:
                stem = name.removesuffix(".weight")
                tensors |= {f"{stem}.{part}": value for part, value in pack_linear(tensor).items()}
            else:
                tensors[name] = tensor.contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
