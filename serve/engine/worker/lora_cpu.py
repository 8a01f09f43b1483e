"""In vLLM's worker on a CPU: what an adapter adds, computed once an adapter, and nothing for tokens without one.

Comes in: the calls of vLLM's `PunicaWrapperCPU`. Goes out: its operations, replaced. Only the worker's extension
imports this. Must not import anything of Noria.

vLLM 0.31's own (`vllm/lora/ops/torch_ops/lora_ops.py`) copy the adapter's matrices once for every token, and take the
index -1, which says "no adapter", for the last slot: a user's token in one batch with a sample got the adapter's part
added. Here tokens are sorted by adapter and multiplied by its matrices as they are; others are left alone.
They also round the sum to the nearest bfloat16. The output is one already, so what is less than half a step of it is
lost, everywhere and always: a part of a thousandth of the output arrives by half, one of a ten-thousandth by a
twentieth, and a policy's first updates would hardly reach its samples. Here sums are rounded up or down in proportion.

Shapes: T tokens, S slots, I and O inputs and outputs, R rank; weights may have a second dimension of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from vllm.lora.punica_wrapper import punica_cpu

_REST = 0xFFFF  # the bits of a float32 that a bfloat16 has not


def install() -> None:
    """Puts these in place of vLLM's in the one module that calls them. A second call changes nothing.

    vLLM's own for prefill unfold a slot a sequence into one a token, which the wrapper has for decoding anyhow.
    """
    for name, operation in OPERATIONS.items():
        setattr(punica_cpu, name, operation)
    wrapper = punica_cpu.PunicaWrapperCPU
    for step in ("shrink", "expand", "expand_slice"):
        setattr(wrapper, f"_{step}_prefill", getattr(wrapper, f"_{step}_decode"))


def shrink(
    inputs_TI: torch.Tensor, weights: torch.Tensor, output_TR: torch.Tensor, slots_T: torch.Tensor, scaling: float = 1.0
) -> None:
    """output = scaling * inputs @ A^T of each token's slot, 0 where it has none; in the output's type (float32)."""
    rank = weights.shape[-2]
    output_TR[:, :rank] = 0
    for slot, rows in _by_slot(slots_T):
        part = inputs_TI[rows].to(output_TR.dtype) @ _matrix(weights, slot).to(output_TR.dtype).t()
        output_TR[rows, :rank] = scaling * part


def expand(
    inputs_TR: torch.Tensor,
    weights: torch.Tensor,
    output_TO: torch.Tensor,
    slots_T: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """output += inputs @ B^T of each token's slot. Whichever of the two is padded further gives way."""
    width = min(weights.shape[-2], output_TO.shape[1])
    expand_slice(inputs_TR, weights[..., :width, :], output_TO, slots_T, 0, width, add_inputs)


def expand_slice(
    inputs_TR: torch.Tensor,
    weights: torch.Tensor,
    output_TO: torch.Tensor,
    slots_T: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same into a slice of the output: of q, k and v in one matrix, say. Summed in float32."""
    part_TO = output_TO[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        part_TO.zero_()
    for slot, rows in _by_slot(slots_T):
        sums = part_TO[rows].float().addmm_(inputs_TR[rows].float(), _matrix(weights, slot).float().t())
        part_TO[rows] = (_rounded(sums) if part_TO.dtype == torch.bfloat16 else sums).to(part_TO.dtype)


def _rounded(sums_TO: torch.Tensor) -> torch.Tensor:
    """In place, to a bfloat16 above or below by the column's threshold, so that small parts arrive on average.

    A float32 is a bfloat16 and 16 bits more. What is one already stays itself.
    """
    sums_TO.view(torch.int32).add_(_thresholds(sums_TO.shape[-1])).bitwise_and_(~_REST)
    return sums_TO


@lru_cache
def _thresholds(columns: int) -> torch.Tensor:
    """For each column how much of the 16 bits carries over; the same in every process, so that answers repeat."""
    return torch.randint(_REST + 1, (columns,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def _by_slot(slots_T: torch.Tensor) -> Iterator[tuple[int, Any]]:
    """Every slot that is asked for with its tokens; all of them at once where it is one slot's batch."""
    found = set(slots_T.tolist())
    for slot in found:
        if slot >= 0:
            yield slot, slice(None) if len(found) == 1 else torch.nonzero(slots_T == slot).flatten()


def _matrix(weights: torch.Tensor, slot: int) -> torch.Tensor:
    return weights[slot].reshape(weights.shape[-2:])


OPERATIONS: dict[str, Callable[..., None]] = {
    "bgmv_shrink": shrink,
    "bgmv_expand": expand,
    "bgmv_expand_slice": expand_slice,
}
"""vLLM's names for them."""
