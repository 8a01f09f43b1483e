"""The GPTQ checkpoint format: four tensors for one linear's weight, packed and unpacked.

Comes in: integers with scales, or the four packed tensors. Goes out: the other. Shapes: O outputs, I inputs,
G groups of inputs, P = 32 / bits values in one int32.
- `qweight_IpO` (I/P, O) int32: P consecutive inputs of one output in one word, the first in the lowest bits
- `qzeros_GOp` (G, O/P) int32: P consecutive outputs' zero points of one group. Format "gptq" (v1) stores each minus
  one, taken off the packed word as gptqmodel 7.6 does, borrows included; "gptq_v2" stores them as they are
- `scales_GO` (G, O) float; `g_idx_I` (I) int32: the group of each input
  weight[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])
Must not import transformers or gptqmodel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from noria.errors import UnsupportedModel
from train.export.checkpoint import NewTensor, TensorEntry, read_bytes

if TYPE_CHECKING:
    import torch

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_WORDS |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class PackedLinear:
    """The four tensors of one quantised linear; the letters are in the module's docstring."""

    qweight_IpO: torch.Tensor
    qzeros_GOp: torch.Tensor
    scales_GO: torch.Tensor
    g_idx_I: torch.Tensor

    def tensors(self, prefix: str) -> list[NewTensor]:
        """The four tensors under a linear's name, ready to be written."""
        values = (self.qweight_IpO, self.qzeros_GOp, self.scales_GO, self.g_idx_I)
        return [to_new(f"{prefix}.{suffix}", value) for suffix, value in zip(SUFFIXES, values, strict=True)]


def pack(
    q_OI: torch.Tensor, zeros_OG: torch.Tensor, scales_OG: torch.Tensor, bits: int, v1: bool = True
) -> PackedLinear:
    """Packs unsigned integers `q_OI` with their zero points and scales; inputs lie in consecutive equal groups."""
    import torch

    group_size = q_OI.shape[1] // scales_OG.shape[1]
    g_idx_I = torch.arange(q_OI.shape[1], dtype=torch.int32) // group_size
    qzeros_GOp = _pack_rows(zeros_OG.to(torch.int64), bits).t().contiguous()
    return PackedLinear(
        qweight_IpO=_pack_rows(q_OI.t().to(torch.int64), bits),
        qzeros_GOp=_signed(qzeros_GOp.to(torch.int64) - _ones(bits)) if v1 else qzeros_GOp,
        scales_GO=scales_OG.t().contiguous(),
        g_idx_I=g_idx_I,
    )


def dequantise(packed: PackedLinear, bits: int, v1: bool = True) -> torch.Tensor:
    """The weight (O, I) in float32 that the four tensors mean."""
    import torch

    q_IO = _unpack_rows(packed.qweight_IpO, bits)
    groups_I = packed.g_idx_I.to(torch.int64)
    zeros_IO = zero_points(packed, bits, v1)[groups_I]
    scales_IO = packed.scales_GO.to(torch.float32)[groups_I]
    return ((q_IO - zeros_IO).to(torch.float32) * scales_IO).t().contiguous()


def zero_points(packed: PackedLinear, bits: int, v1: bool = True) -> torch.Tensor:
    """The zero points (G, O), uint8, that the packed ones mean."""
    import torch

    words_GOp = packed.qzeros_GOp.to(torch.int64) + (_ones(bits) if v1 else 0)
    return _unpack_rows(words_GOp.t(), bits).t().contiguous().to(torch.uint8)


def expected_shapes(weight_shape: tuple[int, ...], bits: int, group_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of each of the four tensors that stand for a weight (O, I)."""
    outputs, inputs = weight_shape
    groups, per_word = inputs // group_size, 32 // bits
    return {
        "qweight": (inputs // per_word, outputs),
        "qzeros": (groups, outputs // per_word),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def quantised_linears(index: Mapping[str, TensorEntry]) -> list[str]:
    """Names (without suffix) of the linears that a checkpoint holds in GPTQ form."""
    return sorted(name.removesuffix(".qweight") for name in index if name.endswith(".qweight"))


def read_packed(index: Mapping[str, TensorEntry], linear: str) -> PackedLinear:
    """The four tensors of one linear from disk. A missing one is a KeyError that names it."""
    return PackedLinear(*(to_torch(index[f"{linear}.{suffix}"]) for suffix in SUFFIXES))


def format_of(config: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Bits, group size and "zero points stored minus one" of a `quantization_config`.

    UnsupportedModel for anything but GPTQ whose bits divide 32.
    """
    method, bits = config.get("quant_method"), config.get("bits")
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if method != "gptq" or bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(
            f"quantisation {method!r} with {bits} bits in format {layout!r} cannot be read; "
            "GPTQ with 2, 4 or 8 bits can",
            param="quantization_config",
        )
    return int(bits), int(config.get("group_size", -1)), layout == "gptq"


def to_torch(entry: TensorEntry) -> torch.Tensor:
    """A tensor from disk, in its stored dtype."""
    import torch

    dtype = getattr(torch, _WORDS[entry.dtype])
    if not entry.size_bytes:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(read_bytes(entry), dtype=dtype).reshape(entry.shape)


def to_new(name: str, tensor: torch.Tensor) -> NewTensor:
    """A tensor ready to be written, in its own dtype."""
    import torch

    word = next(word for word, dtype in _WORDS.items() if dtype == str(tensor.dtype).removeprefix("torch."))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return NewTensor(name, word, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def _pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) integers to (R/P, C) int32 words: P rows in one, the first in the lowest bits."""
    import torch

    per_word = 32 // bits
    words = torch.zeros(values.shape[0] // per_word, values.shape[1], dtype=torch.int64)
    for place in range(per_word):
        words |= (values[place::per_word].cpu() & ((1 << bits) - 1)) << (bits * place)
    return _signed(words)


def _ones(bits: int) -> int:
    """A word that holds a one in each of its values."""
    return sum(1 << shift for shift in range(0, 32, bits))


def _signed(words: torch.Tensor) -> torch.Tensor:
    """64-bit integers, modulo 2**32, as int32."""
    import torch

    low = words & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack_rows`, as int64."""
    import torch

    wide = words.to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=words.device)[None, :, None]
    values = (wide[:, None, :] >> shifts) & ((1 << bits) - 1)
    return values.reshape(-1, words.shape[1])
