"""QLoRA's base (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the language model's linears in 4 bits.

Comes in: our own GPTQ serving checkpoint, or a loaded model. Goes out: a model whose decoder linears hold packed
weights and whose other tensors are whole; LoRA goes on top as on any other. What is learnt is merged into the master,
never into these. Must not import `serve`.

Shapes: T rows of activations, I inputs and O outputs of a linear.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from noria.errors import TrainingError
from noria.modules import Architecture
from train.export.checkpoint import tensor_index
from train.export.gptq_format import PackedLinear, format_of, read_packed, to_torch, zero_points


class _PackedMatmul(torch.autograd.Function):
    """x W^T, with W unpacked on the way there and once more on the way back: only the packed form is kept."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, linear: GptqLinear) -> torch.Tensor:
        """(.., O)."""
        ctx.linear = linear
        return x_TI @ linear.unpacked(x_TI.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of x; packed weights have none."""
        return grads[0] @ ctx.linear.unpacked(grads[0].dtype), None


class GptqLinear(nn.Module):
    """A frozen linear over the four tensors of the GPTQ format, differentiable in its input, on any device.

    It means exactly what `train.export.gptq_format.dequantise` says, which is what verification measures, but unpacks
    in 32 bits and keeps zero points unpacked (G, O): five times as quick on a CPU.
    """

    qweight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(self, packed: PackedLinear, bias: torch.Tensor | None, bits: int, v1: bool) -> None:
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = int(packed.g_idx_I.shape[0]), int(packed.qweight_IpO.shape[1])
        groups = packed.scales_GO.shape[0]
        even_I = torch.arange(self.in_features) // max(1, self.in_features // groups)
        self.even = bool((packed.g_idx_I == even_I).all())  # groups lie one after the other, all of a size
        self.register_buffer("qweight", packed.qweight_IpO, persistent=False)
        self.register_buffer("zeros", zero_points(packed, bits, v1), persistent=False)
        self.register_buffer("scales", packed.scales_GO, persistent=False)
        self.register_buffer("g_idx", packed.g_idx_I.long(), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (O, I)."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.qweight.device)[None, :, None]
        q_IO = ((self.qweight[:, None, :] >> shifts) & ((1 << self.bits) - 1)).reshape(self.in_features, -1).float()
        zeros_GO, scales_GO = self.zeros.float(), self.scales.float()
        if self.even:
            q_GIO = q_IO.view(len(scales_GO), -1, self.out_features)
            weight_IO = ((q_GIO - zeros_GO[:, None]) * scales_GO[:, None]).view_as(q_IO)
        else:
            weight_IO = (q_IO - zeros_GO[self.g_idx]) * scales_GO[self.g_idx]
        return weight_IO.t().to(dtype)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """(.., O)."""
        if torch.is_autocast_enabled(x_TI.device.type):
            x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
        y_TO: torch.Tensor = _PackedMatmul.apply(x_TI, self)
        return y_TO if self.bias is None else y_TO + self.bias.to(y_TO.dtype)


def load_gptq(serving: Path, architecture: Architecture, dtype: torch.dtype) -> Any:
    """A serving checkpoint as a model that can be trained on top of. Memory never holds the unpacked linears.

    Raises TrainingError when the folder is no such checkpoint or lacks a tensor, UnsupportedModel for other formats.
    """
    try:
        written = json.loads((serving / "config.json").read_text())
    except FileNotFoundError as error:
        raise TrainingError(f"train.base='gptq': there is no checkpoint in {serving}", code="no_base") from error
    bits, _, v1 = format_of(written.get("quantization_config") or {})
    config = transformers.AutoConfig.from_pretrained(  # nosec B615
        serving, trust_remote_code=False, local_files_only=True
    )
    del config.quantization_config
    index = tensor_index(serving)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, architecture.auto_class).from_config(config, dtype=dtype)
    for path in architecture.lm_linears([name for name, _ in model.named_parameters()]):
        stored = _stored_linear(path, architecture, index)
        bias = to_torch(index[f"{stored}.bias"]).to(dtype) if f"{stored}.bias" in index else None
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, GptqLinear(read_packed(index, stored), bias, bits, v1))
    _fill(model, architecture, index, dtype)
    return model.eval()


def to_nf4(model: Any, architecture: Architecture, dtype: torch.dtype) -> None:
    """Turns the decoder's linears into bitsandbytes' Linear4bit (NF4, doubly quantised), in place.

    The model then lies on the GPU, where there is one: that move packs the weights. Raises TrainingError without the
    package.
    """
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise TrainingError(
            "train.base='bitsandbytes' needs the package: pip install bitsandbytes", code="no_bitsandbytes"
        ) from error
    for path in architecture.lm_linears([name for name, _ in model.named_parameters()]):
        plain = model.get_submodule(path)
        packed = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, plain.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            plain.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        packed.bias = plain.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")


def _stored_linear(path: str, architecture: Architecture, index: Any) -> str:
    """The name under which the checkpoint holds a linear's four tensors."""
    return architecture.to_checkpoint(f"{path}.qweight", index).removesuffix(".qweight")


def _fill(model: Any, architecture: Architecture, index: Any, dtype: torch.dtype) -> None:
    """Gives every parameter that is still empty its tensor from the checkpoint."""
    model.tie_weights()  # tied tensors are stored once; what is made empty comes untied
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type != "meta":
            continue
        entry = index[architecture.to_checkpoint(name, index)]
        if entry.shape != tuple(parameter.shape):
            raise TrainingError(f"{entry.name} is {list(entry.shape)}, the model's {name} is {list(parameter.shape)}")
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(to_torch(entry).to(dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
    model.tie_weights()
