"""QLoRA: the language model's linears in 4 bits, from our own serving checkpoint or by bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from noria.errors import TrainingError, UnsupportedModel
from noria.module_settings import ModulePolicies
from tests.families import FAMILIES, architecture, batch, tiny
from tests.flow.rtn import quantize_rtn
from tests.tiny import build_tiny_vlm
from train.export.checkpoint import tensor_index
from train.export.gptq_format import PackedLinear, dequantise, pack, read_packed
from train.methods.policies import apply_policies
from train.methods.policy_model import load_policy, read_architecture
from train.methods.quantized_base import GptqLinear, load_gptq


def packed(outputs: int = 16, inputs: int = 64, *, shuffled: bool = False) -> PackedLinear:
    """Random integers, zero points and scales; `shuffled` as act-order would leave the groups."""
    draw = torch.Generator().manual_seed(0)
    made = pack(
        torch.randint(0, 16, (outputs, inputs), generator=draw),
        torch.randint(1, 16, (outputs, inputs // 32), generator=draw),
        torch.rand(outputs, inputs // 32, generator=draw).half(),
        bits=4,
    )
    order = torch.randperm(inputs, generator=draw) if shuffled else torch.arange(inputs)
    return PackedLinear(made.qweight_IpO, made.qzeros_GOp, made.scales_GO, made.g_idx_I[order])


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_packed_linear_is_the_linear_it_means(shuffled: bool) -> None:
    four = packed(shuffled=shuffled)
    ours = GptqLinear(four, torch.arange(16.0), bits=4, v1=True)
    assert torch.equal(ours.unpacked(torch.float32), dequantise(four, 4))
    plain = nn.Linear(64, 16)
    plain.weight.data, plain.bias.data = dequantise(four, 4), torch.arange(16.0)
    grads = []
    for linear in (plain, ours):
        x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).requires_grad_()
        y = linear(x)
        (y**2).sum().backward()
        assert x.grad is not None
        grads.append((y.detach(), x.grad))
    torch.testing.assert_close(grads[1], grads[0])


def test_only_the_packed_weight_is_kept_for_the_way_back() -> None:
    """QLoRA's point: a graph through the linear holds no unpacked weight."""
    linear = GptqLinear(packed(256, 256), None, bits=4, v1=True)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(torch.ones(1, 256, requires_grad=True)).sum().backward()
    assert sum(kept) < 256 * 256 // 8


def as_meant(model: Any, serving: Path) -> Any:
    """A full-precision model whose decoder linears hold what the serving checkpoint's mean."""
    row, index = architecture(model), tensor_index(serving)
    for path in row.lm_linears([name for name, _ in model.named_parameters()]):
        stored = row.to_checkpoint(f"{path}.qweight", index).removesuffix(".qweight")
        model.get_submodule(path).weight.data = dequantise(read_packed(index, stored), 4)
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_serving_checkpoint_of_every_family_is_a_base(family: str, tmp_path: Path) -> None:
    """Saved by transformers, quantised by rounding, loaded in 4 bits: the same logits as with unpacked weights."""
    model = tiny(family).eval()
    model.save_pretrained(tmp_path / "master")
    quantize_rtn(tmp_path / "master", tmp_path / "serving")
    base = load_gptq(tmp_path / "serving", architecture(model), torch.float32)
    inputs = batch(family, model)
    with torch.no_grad():
        expected = as_meant(model, tmp_path / "serving")(**inputs)
        torch.testing.assert_close(base(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-5)
    applied = apply_policies(base, architecture(base), ModulePolicies.model_validate({"aligner": "full"}).resolved())
    sizes = {row.module: row.parameters for row in applied.rows}
    assert sizes["language_model"] == sum(
        p.numel() for n, p in model.named_parameters() if architecture(model).module_of(n) == "language_model"
    )
    optimizer = applied.optimizer()
    first = base(**inputs).loss
    first.backward()
    optimizer.step()
    assert float(base(**inputs).loss.detach()) < float(first.detach())
    torch.testing.assert_close(float(first.detach()), float(expected.loss), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    master = build_tiny_vlm(tmp_path / "master", tie_word_embeddings=True)
    quantize_rtn(master, tmp_path / "serving")
    base = load_gptq(tmp_path / "serving", read_architecture(master), torch.float32)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert not any(p.device.type == "meta" for p in [*base.parameters(), *base.buffers()])


def test_what_is_no_4_bit_base_is_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    row = read_architecture(tiny_vlm)
    with pytest.raises(TrainingError, match=r"train\.base='gptq': the parent has no serving checkpoint"):
        load_policy(tiny_vlm, [], row, torch.float32, base="gptq")
    with pytest.raises(TrainingError, match=r"train\.base='gptq': there is no checkpoint in .*nowhere"):
        load_policy(tiny_vlm, [], row, torch.float32, base="gptq", serving=tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        load_policy(tiny_vlm, [], row, torch.float32, base="gptq", serving=tiny_vlm)


def test_bitsandbytes_packs_the_decoder_or_says_what_is_missing(tiny_vlm: Path) -> None:
    """bitsandbytes is installed beside a GPU only, though it runs without one; both ends are real."""
    row = read_architecture(tiny_vlm)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(TrainingError, match="pip install bitsandbytes"):
            load_policy(tiny_vlm, [], row, torch.float32, base="bitsandbytes")
        return
    plain = load_policy(tiny_vlm, [], row, torch.float32)
    base = load_policy(tiny_vlm, [], row, torch.float32, base="bitsandbytes")
    linears = row.lm_linears([name for name, _ in plain.named_parameters()])
    assert {base.get_submodule(path).weight.dtype for path in linears} == {torch.uint8}
    applied = apply_policies(base, row, ModulePolicies.model_validate({"aligner": "full"}).resolved())
    sizes = {r.module: r.parameters for r in applied.rows}
    unpacked = apply_policies(plain, row, ModulePolicies.model_validate({"aligner": "full"}).resolved())
    assert sizes == {r.module: r.parameters for r in unpacked.rows}
    device = next(base.parameters()).device
    ids = torch.arange(40, 56, device=device)[None]
    optimizer = applied.optimizer(lr=0.0)
    first = base(input_ids=ids, labels=ids).loss
    first.backward()
    assert all(p.grad is not None for n, p in base.named_parameters() if "lora_B" in n)
    optimizer.step()
    assert float(base(input_ids=ids, labels=ids).loss.detach()) < float(first.detach())
