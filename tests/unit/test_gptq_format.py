"""The GPTQ format against gptqmodel's own packing and unpacking, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noria.errors import IntegrityError, UnsupportedModel
from noria.modules.hashes import group_hash
from train.export import gptq_format
from train.export.checkpoint import tensor_index, write_file

OUTPUTS, INPUTS, GROUP = 64, 96, 32


def draw(bits: int, lowest_zero: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random integers (O, I), zero points (O, G) and scales (O, G)."""
    made = torch.Generator().manual_seed(bits)
    top = 2**bits
    q_OI = torch.randint(0, top, (OUTPUTS, INPUTS), generator=made)
    zeros_OG = torch.randint(lowest_zero, top, (OUTPUTS, INPUTS // GROUP), generator=made)
    scales_OG = torch.rand(OUTPUTS, INPUTS // GROUP, generator=made).add(0.01).to(torch.float16)
    return q_OI, zeros_OG, scales_OG


def meaning(q_OI: torch.Tensor, zeros_OG: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """The weight by its definition."""
    return (q_OI - zeros_OG.repeat_interleave(GROUP, 1)) * scales_OG.float().repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_packed_is_unpacked(bits: int, v1: bool) -> None:
    q_OI, zeros_OG, scales_OG = draw(bits, lowest_zero=0)
    packed = gptq_format.pack(q_OI, zeros_OG, scales_OG, bits, v1)
    assert torch.equal(gptq_format.dequantise(packed, bits, v1), meaning(q_OI, zeros_OG, scales_OG))


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_and_dtypes_are_the_formats(bits: int) -> None:
    packed = gptq_format.pack(*draw(bits), bits)
    shapes = gptq_format.expected_shapes((OUTPUTS, INPUTS), bits, GROUP)
    tensors = {tensor.name: tensor for tensor in packed.tensors("layer")}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {f"layer.{k}": v for k, v in shapes.items()}
    assert [tensors[f"layer.{suffix}"].dtype for suffix in gptq_format.SUFFIXES] == ["I32", "I32", "F16", "I32"]


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_packs_the_same_words(bits: int, v1: bool) -> None:
    q_OI, zeros_OG, scales_OG = draw(bits)
    theirs = _theirs(bits, q_OI, zeros_OG, scales_OG)
    if v1:
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        convert_gptq_v2_to_v1_format_module(theirs, quantize_config=_their_config(bits))
    ours = gptq_format.pack(q_OI, zeros_OG, scales_OG, bits, v1)
    assert torch.equal(ours.qweight_IpO, theirs.qweight)
    assert torch.equal(ours.qzeros_GOp, theirs.qzeros)
    assert torch.equal(ours.scales_GO, theirs.scales)
    assert torch.equal(ours.g_idx_I, theirs.g_idx)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_reads_the_same_weight(bits: int) -> None:
    q_OI, zeros_OG, scales_OG = draw(bits)
    theirs = _theirs(bits, q_OI, zeros_OG, scales_OG)
    theirs.post_init()
    ours = gptq_format.dequantise(gptq_format.pack(q_OI, zeros_OG, scales_OG, bits), bits)
    assert torch.allclose(ours, theirs.dequantize_weight().t().float(), rtol=1e-3, atol=1e-5)  # theirs is float16


def test_groups_need_not_be_consecutive() -> None:
    q_OI, zeros_OG, scales_OG = draw(4)
    packed = gptq_format.pack(q_OI, zeros_OG, scales_OG, 4)
    shuffled = gptq_format.PackedLinear(packed.qweight_IpO, packed.qzeros_GOp, packed.scales_GO, packed.g_idx_I.flip(0))
    groups = torch.arange(INPUTS).flip(0) // GROUP
    expected = (q_OI - zeros_OG[:, groups]) * scales_OG.float()[:, groups]
    assert torch.equal(gptq_format.dequantise(shuffled, 4), expected)


def test_tensors_survive_a_file(tmp_path: Path) -> None:
    packed = gptq_format.pack(*draw(4), 4)
    write_file(tmp_path / "model.safetensors", packed.tensors("a.b"))
    index = tensor_index(tmp_path)
    assert gptq_format.quantised_linears(index) == ["a.b"]
    read = gptq_format.read_packed(index, "a.b")
    assert torch.equal(read.qweight_IpO, packed.qweight_IpO)
    assert torch.equal(gptq_format.dequantise(read, 4), gptq_format.dequantise(packed, 4))


def test_a_file_cut_short_is_told_from_a_sound_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, gptq_format.pack(*draw(4), 4).tensors("a.b"))
    names = ["a.b.qweight", "a.b.scales"]
    assert group_hash(tensor_index(tmp_path), names) == group_hash(tensor_index(tmp_path), names[::-1])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="cut short"):
        tensor_index(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
    ],
)
def test_other_quantisations_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        gptq_format.format_of(config)


def test_the_format_is_read_from_the_config() -> None:
    assert gptq_format.format_of({"quant_method": "gptq", "bits": 4, "group_size": 128}) == (4, 128, True)
    v2 = {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    assert gptq_format.format_of(v2) == (8, 32, False)


def _their_config(bits: int) -> Any:
    from gptqmodel.quantization import QuantizeConfig

    return QuantizeConfig(bits=bits, group_size=GROUP, sym=True, desc_act=False, offload_to_disk=False)


def _theirs(bits: int, q_OI: torch.Tensor, zeros_OG: torch.Tensor, scales_OG: torch.Tensor) -> Any:
    """gptqmodel's own module, packed by it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    module = TorchLinear(
        bits=bits, group_size=GROUP, sym=True, desc_act=False, in_features=INPUTS, out_features=OUTPUTS, bias=False
    )
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = meaning(q_OI, zeros_OG, scales_OG)
    module.pack_original(linear, scales_OG.float(), zeros_OG.float())
    return module
