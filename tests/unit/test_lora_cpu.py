"""Adapters on a CPU: each token gets its own adapter's part, and one without an adapter gets nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from serve.engine.worker.lora_cpu import OPERATIONS, expand_slice, install, shrink

TOKENS, INPUTS, OUTPUTS, RANK, SLOTS = 7, 24, 12, 4, 2
MIXED = [1, -1, 0, 0, 1, -1, 1]


def drawn(*shape: int) -> torch.Tensor:
    """Seeded numbers of this shape, as a model's weights are held."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


@pytest.mark.parametrize("slots", [MIXED, [0] * TOKENS, [1] * TOKENS, [-1] * TOKENS])
def test_each_token_gets_what_its_adapter_says(slots: list[int]) -> None:
    inputs, base = drawn(TOKENS, INPUTS), drawn(TOKENS, 2 * OUTPUTS)
    a, b = drawn(SLOTS, 1, RANK, INPUTS), drawn(SLOTS, 1, OUTPUTS, RANK)
    buffer, output = torch.full((TOKENS, RANK), 9.0), base.clone()
    shrink(inputs, a, buffer, torch.tensor(slots), 0.5)
    expand_slice(buffer, b, output, torch.tensor(slots), OUTPUTS, OUTPUTS)
    for row, slot in enumerate(slots):
        added = torch.zeros(OUTPUTS)
        if slot >= 0:
            added = 0.5 * inputs[row].float() @ a[slot, 0].float().t() @ b[slot, 0].float().t()
        wanted = (base[row, OUTPUTS:].float() + added).to(torch.bfloat16)
        torch.testing.assert_close(output[row, OUTPUTS:], wanted, rtol=2e-2, atol=2e-2)
        assert torch.equal(output[row, :OUTPUTS], base[row, :OUTPUTS])
        if slot < 0:
            assert torch.equal(output[row], base[row]), "a user's token is as it was, to the bit"


def arrives(operations: dict[str, Any], strength: float) -> float:
    """Which share of a part so much smaller than the output is in the sum: 1 where all of it arrives, on average."""
    base, buffer = drawn(64, 8192), drawn(64, RANK).float()
    weights = strength / RANK**0.5 * drawn(SLOTS, 1, 8192, RANK)
    output, wanted = base.clone(), buffer @ weights[0, 0].float().t()
    operations["bgmv_expand"](buffer, weights, output, torch.zeros(64, dtype=torch.long))
    added = output.double() - base.double()
    return float((added * wanted).sum() / wanted.double().square().sum())


@pytest.mark.parametrize(("strength", "vllms_own"), [(1e-2, 1.0), (1e-3, 0.5), (1e-4, 0.05)])
def test_a_part_below_the_outputs_own_rounding_arrives(strength: float, vllms_own: float) -> None:
    assert arrives(OPERATIONS, strength) == pytest.approx(1.0, abs=0.1)
    assert arrives(vars(lora_ops), strength) == pytest.approx(vllms_own, abs=0.1)


def test_a_policy_that_is_still_zero_changes_no_bit() -> None:
    output, base = drawn(TOKENS, OUTPUTS), drawn(TOKENS, OUTPUTS)
    expand_slice(torch.zeros(TOKENS, RANK), drawn(SLOTS, 1, OUTPUTS, RANK), output, torch.tensor(MIXED), 0, OUTPUTS)
    assert torch.equal(output, base)


def test_one_adapters_batch_is_vllms_own() -> None:
    inputs, base = drawn(TOKENS, INPUTS), drawn(TOKENS, OUTPUTS)
    weights, slots = (drawn(SLOTS, 1, RANK, INPUTS), drawn(SLOTS, 1, OUTPUTS, RANK)), torch.tensor([1] * TOKENS)
    found = []
    for operations in (OPERATIONS, vars(lora_ops)):
        buffer, output = torch.zeros(TOKENS, RANK), base.clone()
        operations["bgmv_shrink"](inputs, weights[0], buffer, slots, 2.0)
        operations["bgmv_expand"](buffer, weights[1], output, slots)
        found.append(output)
    torch.testing.assert_close(*found, rtol=2e-2, atol=5e-2)


def test_in_vllms_own_a_token_without_an_adapter_gets_the_last_ones_part() -> None:
    """The trap; when this fails, vLLM has mended it, and `serve.engine.worker.lora_cpu` is for speed alone."""
    buffer = torch.zeros(1, RANK)
    lora_ops.bgmv_shrink(drawn(1, INPUTS), drawn(SLOTS, 1, RANK, INPUTS), buffer, torch.tensor([-1]))
    assert bool(buffer.any())


@pytest.mark.parametrize("prefill", [True, False])
def test_vllms_wrapper_gives_each_token_its_own(prefill: bool) -> None:
    """A batch as the worker has it: a user's token, two of one adapter, two of the other; prompts and answers alike."""
    install()
    ids = (0, 7, 7, 9, 9)
    wrapper = punica_cpu.PunicaWrapperCPU(16, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=prefill), [9, 7], SLOTS, 100)
    inputs, base = drawn(len(ids), INPUTS), drawn(len(ids), OUTPUTS)
    a, b = drawn(SLOTS, 1, RANK, INPUTS), drawn(SLOTS, 1, OUTPUTS, RANK)
    output = base.clone()
    wrapper.add_lora_linear(output, inputs, (a,), (b,), 0.5, (OUTPUTS,))
    for row, slot in enumerate((None, 1, 1, 0, 0)):
        added = 0.0 if slot is None else 0.5 * inputs[row].float() @ a[slot, 0].float().t() @ b[slot, 0].float().t()
        wanted = (base[row].float() + added).to(torch.bfloat16)
        torch.testing.assert_close(output[row], wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(output[0], base[0]), "a user's token is as it was, to the bit"


def test_they_take_vllms_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ours in OPERATIONS.items():
        theirs = getattr(lora_ops, name)
        assert len(inspect.signature(ours).parameters) == len(inspect.signature(theirs).parameters), name
        monkeypatch.setattr(punica_cpu, name, theirs)
    install()
    assert all(getattr(punica_cpu, name) is ours for name, ours in OPERATIONS.items())
