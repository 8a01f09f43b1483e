"""Merging adapters: the same numbers as peft's own merge, and nothing else touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from noria.errors import TrainingError
from noria.modules import architecture_of
from tests.tiny import build_tiny_vlm
from train.export.checkpoint import read_bytes, tensor_index
from train.export.merge import merge

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = rf".*language_model.*\.({'|'.join(LINEARS)})"


def make_adapter(model: Any, path: Path, seed: int, **more: Any) -> Any:
    """A random adapter over the language model's linears, saved by peft; returns the peft model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **more)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(path)
    return adapted


def load(folder: Path) -> Any:
    """The checkpoint in transformers, in float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def rewritten(adapter: Path, out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of an adapter with other settings and tensors."""
    shutil.copytree(adapter, out)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    if tensors is not None:
        save_file(tensors, out / "adapter_model.safetensors")
    return out


@pytest.fixture(scope="module")
def adapter(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of the tiny model."""
    path = tmp_path_factory.mktemp("adapter") / "a"
    make_adapter(load(tiny_vlm), path, seed=1)
    return path


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 7}}]
)
def test_one_adapter_gives_peft_s_numbers(tiny_vlm: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    expected = make_adapter(load(tiny_vlm), tmp_path / "a", seed=2, **more).merge_and_unload().state_dict()
    report = merge(tiny_vlm, [tmp_path / "a"], tmp_path / "merged")
    got = load(tmp_path / "merged").state_dict()
    assert set(got) == set(expected)
    worst = max(float((got[name] - expected[name]).abs().max()) for name in expected)
    assert worst < 1e-6  # float32 sums in another order
    assert (report.adapters, report.merged, report.max_update > 0.01) == (1, 2 * len(LINEARS), True)


def test_a_lineage_is_summed(tiny_vlm: Path, tmp_path: Path) -> None:
    first = make_adapter(load(tiny_vlm), tmp_path / "a", seed=3).merge_and_unload()
    expected = make_adapter(first, tmp_path / "b", seed=4).merge_and_unload().state_dict()
    merge(tiny_vlm, [tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    got = load(tmp_path / "merged").state_dict()
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 2e-6


def test_everything_else_keeps_its_bytes(tiny_vlm: Path, adapter: Path, tmp_path: Path) -> None:
    merge(tiny_vlm, [adapter], tmp_path / "merged")
    before, after = tensor_index(tiny_vlm), tensor_index(tmp_path / "merged")
    assert list(before) == list(after)
    arch = architecture_of(json.loads((tiny_vlm / "config.json").read_text()))
    adapted = {f"{linear}.weight" for linear in arch.lm_linears(before, "checkpoint")}
    changed = {name for name in before if read_bytes(before[name]) != read_bytes(after[name])}
    assert changed == adapted
    side = {path.name for path in tiny_vlm.iterdir() if path.suffix != ".safetensors"}
    assert all((tmp_path / "merged" / name).read_bytes() == (tiny_vlm / name).read_bytes() for name in side)


def test_the_stored_dtype_stays_and_is_rounded_to_once(tmp_path: Path) -> None:
    master = build_tiny_vlm(tmp_path / "vlm", dtype="bfloat16")
    exact = make_adapter(load(master), tmp_path / "a", seed=5).merge_and_unload().state_dict()
    merge(master, [tmp_path / "a"], tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    got = load(tmp_path / "merged").state_dict()
    assert all(torch.allclose(got[name], exact[name], rtol=2**-8, atol=1e-6) for name in exact)


def test_no_adapter_is_a_copy(tiny_vlm: Path, tmp_path: Path) -> None:
    report = merge(tiny_vlm, [], tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tiny_vlm / "model.safetensors").read_bytes()
    assert (report.merged, report.max_update) == (0, 0.0)
    assert not (tmp_path / "merged.tmp").exists()


def test_an_adapter_on_the_tower_is_refused(tiny_vlm: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {name.replace("language_model.layers", "vision_tower.encoder.layers"): t for name, t in tensors.items()}
    wrong = rewritten(adapter, tmp_path / "wrong", {}, moved)
    with pytest.raises(TrainingError, match=r"vision_tower.*no linear of the language model"):
        merge(tiny_vlm, [wrong], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}])
def test_what_is_not_a_plain_lora_is_refused(tiny_vlm: Path, adapter: Path, tmp_path: Path, config: Any) -> None:
    wrong = rewritten(adapter, tmp_path / "wrong", config)
    with pytest.raises(TrainingError, match="not a plain LoRA"):
        merge(tiny_vlm, [wrong], tmp_path / "merged")


def test_a_wrong_rank_a_missing_half_and_a_nan_are_refused(tiny_vlm: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    with pytest.raises(TrainingError, match="at rank 8"):
        merge(tiny_vlm, [rewritten(adapter, tmp_path / "rank", {"r": 8})], tmp_path / "merged")
    half = {name: tensor for name, tensor in tensors.items() if name != first}
    with pytest.raises(TrainingError, match="only half"):
        merge(tiny_vlm, [rewritten(adapter, tmp_path / "half", {}, half)], tmp_path / "merged")
    broken = {**tensors, first: tensors[first] * float("nan")}
    with pytest.raises(TrainingError, match="not finite"):
        merge(tiny_vlm, [rewritten(adapter, tmp_path / "nan", {}, broken)], tmp_path / "merged")
