"""Deltas on tiny models of every family: memory and disk agree to the bit, and nothing changes that was frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from noria.errors import TrainingError
from noria.modules import architecture_of
from noria.records import MODULES, Module
from tests.tiny_families import FAMILIES, random_model
from train.export.checkpoint import read_bytes, tensor_index
from train.export.merge import merge
from train.methods.delta import (
    FULL,
    LORA,
    POLICIES,
    apply_deltas,
    changed_modules,
    delta_folders,
    model_architecture,
    read_policies,
    save_delta,
)

Policies = dict[Module, str]
EYES: Policies = {"vision_tower": "full", "aligner": "lora", "language_model": "lora"}
SFT: Policies = {"vision_tower": "frozen", "aligner": "full", "language_model": "lora"}
LAST: Policies = {"vision_tower": "lora", "aligner": "lora", "language_model": "full"}


def load(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A checkpoint in transformers, by default in its stored dtype."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def trained(model: Any, policies: Policies, seed: int = 0, ranks: dict[str, int] | None = None) -> Any:
    """The model after a training that moved everything the policies let it move, by random numbers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    arch = model_architecture(model)
    linears = {n: arch.module_of(f"{n}.weight") for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n, module in linears.items() if policies[module] == "lora" and n != "lm_head"]
    full = [n for n, _ in model.named_parameters() if policies[arch.module_of(n)] == "full"]
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    if targets:
        config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, rank_pattern=ranks or {})
        model = get_peft_model(model, config, autocast_adapter_dtype=True)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    for name in full:
        parameters[name].requires_grad_(True).data.add_(torch.randn_like(parameters[name]), alpha=0.3)
    return model


@pytest.fixture(scope="module", params=[*FAMILIES])
def master(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's tiny checkpoint in bfloat16."""
    torch.manual_seed(1)
    folder: Path = tmp_path_factory.mktemp("master") / request.param
    random_model(request.param).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """One tiny checkpoint in float32."""
    torch.manual_seed(2)
    random_model("llava").save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_memory_and_disk_agree_bit_for_bit(master: Path, tmp_path: Path) -> None:
    """Three trainings in a row: full under LoRA, LoRA over full, full over LoRA."""
    rows: tuple[tuple[str, Policies, dict[str, int]], ...] = (
        ("01-eyes", EYES, {}),
        ("02-sft", SFT, {"mlp.up_proj": 2}),
        ("03-last", LAST, {}),
    )
    for number, (name, policies, ranks) in enumerate(rows):
        out = tmp_path / "adapter" / name
        save_delta(trained(load(master, torch.float32), policies, number, ranks), out, dict(policies))
    report = merge(master, [tmp_path / "adapter"], tmp_path / "merged")
    in_memory = load(master)
    apply_deltas(in_memory, delta_folders(tmp_path / "adapter"))
    on_disk = dict(load(tmp_path / "merged").named_parameters())
    before = dict(load(master).named_parameters())
    changed = {name for name, weight in in_memory.named_parameters() if not torch.equal(weight, before[name])}
    for name, weight in in_memory.named_parameters():
        assert weight.dtype == on_disk[name].dtype == torch.bfloat16
        assert torch.equal(weight, on_disk[name]), name
    arch = model_architecture(in_memory)
    parted = arch.partition(changed)
    assert all(parted[module] for module in MODULES)
    assert report.adapters == 3
    assert report.replaced >= len(parted["vision_tower"])
    index, merged = tensor_index(master), tensor_index(tmp_path / "merged")
    assert list(index) == list(merged)


def test_a_float32_policy_is_what_peft_merges(master: Path, tmp_path: Path) -> None:
    model = trained(load(master, torch.float32), EYES)
    save_delta(model, tmp_path / "delta", dict(EYES))
    expected = dict(model.merge_and_unload().named_parameters())
    got = load(master, torch.float32)
    apply_deltas(got, [tmp_path / "delta"])
    worst = {name: float((weight - expected[name]).detach().abs().max()) for name, weight in got.named_parameters()}
    assert max(worst.values()) < 1e-5, max(worst, key=lambda name: worst[name])


@pytest.mark.parametrize("module", MODULES)
def test_what_was_frozen_keeps_its_bytes(master: Path, tmp_path: Path, module: Module) -> None:
    policies: Policies = {one: "full" if one == module else "frozen" for one in MODULES}
    save_delta(trained(load(master, torch.float32), policies), tmp_path / "delta", {module: "full"})
    merge(master, [tmp_path / "delta"], tmp_path / "merged")
    before, after = tensor_index(master), tensor_index(tmp_path / "merged")
    changed = [name for name in before if read_bytes(before[name]) != read_bytes(after[name])]
    parted = architecture_of(json.loads((master / "config.json").read_text())).partition(changed, "checkpoint")
    assert [one for one in MODULES if parted[one]] == [module]
    assert changed_modules([tmp_path / "delta"]) == (module,)


def test_a_delta_holds_what_was_trained_and_the_same_weights_give_the_same_bytes(llava: Path, tmp_path: Path) -> None:
    model = trained(load(llava), EYES)
    for name in ("a", "b"):
        save_delta(model, tmp_path / name, dict(EYES))
    files = [path.name for path in sorted((tmp_path / "a").iterdir())]
    assert files == ["adapter_config.json", LORA, FULL, POLICIES]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    arch = model_architecture(model)
    full = load_file(tmp_path / "a" / FULL)
    assert {arch.module_of(name) for name in full} == {"vision_tower"}
    assert len(full) == sum(name.startswith("model.vision_tower.") for name, _ in load(llava).named_parameters())
    assert read_policies(tmp_path / "a")["aligner"] == {"policy": "lora"}
    save_delta(model, tmp_path / "half", dict(EYES), dtype=torch.bfloat16)
    assert {one.dtype for one in load_file(tmp_path / "half" / FULL).values()} == {torch.bfloat16}
    zeros = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    save_delta(model, tmp_path / "gathered", dict(EYES), state=zeros)
    assert not any(one.any() for one in load_file(tmp_path / "gathered" / FULL).values())


def test_part_of_a_module_is_a_delta_too(llava: Path, tmp_path: Path) -> None:
    model = load(llava).requires_grad_(False)
    last = model.get_submodule("model.vision_tower.encoder.layers.1").requires_grad_(True)
    last.mlp.fc1.weight.data += 1
    save_delta(model, tmp_path / "delta", {"vision_tower": {"policy": "full", "last_blocks": 1}})
    assert all(".layers.1." in name for name in load_file(tmp_path / "delta" / FULL))
    merge(llava, [tmp_path / "delta"], tmp_path / "merged")
    assert read_policies(tmp_path / "delta")["vision_tower"] == {"policy": "full", "last_blocks": 1}
    got = load(tmp_path / "merged").get_submodule("model.vision_tower.encoder.layers")
    assert torch.equal(got[1].mlp.fc1.weight, last.mlp.fc1.weight)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"aligner": "lora", "language_model": "lora"}, "vision_tower is frozen"),
        ({**EYES, "aligner": "full"}, "aligner is full"),
        ({**EYES, "vision_tower": "lora"}, r"\(full\), but vision_tower is lora"),
    ],
)
def test_a_training_that_was_not_asked_for_is_not_saved(llava: Path, tmp_path: Path, said: Any, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        save_delta(trained(load(llava), EYES), tmp_path / "delta", said)
    assert not (tmp_path / "delta").exists()


def test_a_module_that_should_have_been_trained_and_was_not_is_an_error(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"aligner is full, but nothing of it was trained"):
        save_delta(
            trained(load(llava), {**SFT, "aligner": "frozen"}),
            tmp_path / "delta",
            {"language_model": "lora", "aligner": "full"},
        )


def test_numbers_that_are_not_finite_are_not_saved(llava: Path, tmp_path: Path) -> None:
    model = trained(load(llava), EYES)
    next(p for n, p in model.named_parameters() if "vision_tower" in n).data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"vision_tower.*not finite"):
        save_delta(model, tmp_path / "delta", dict(EYES))


Change = Callable[[dict[str, torch.Tensor]], object]


def respelled(delta: Path, out: Path, file: str, change: Change, policies: Any = None) -> Path:
    """A copy of a delta with one file's tensors, or its policies, changed."""
    shutil.copytree(delta, out)
    tensors = load_file(delta / file)
    change(tensors)
    save_file(tensors, out / file)
    if policies is not None:
        (out / POLICIES).write_text(json.dumps(policies))
    return out


TOWER = "model.vision_tower.post_layernorm.weight"


@pytest.mark.parametrize(
    ("file", "change", "policies", "told"),
    [
        (FULL, lambda t: None, {"aligner": {"policy": "lora"}}, "vision_tower is frozen"),
        (FULL, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}), None, "language_model is lora"),
        (FULL, lambda t: t.update({TOWER: torch.zeros(5)}), None, r"post_layernorm.*is \[5\].*is \[32\]"),
        (FULL, lambda t: t.update({TOWER: torch.full((32,), torch.inf)}), None, "post_layernorm.*not finite"),
        (FULL, lambda t: t.update({"model.vision_tower.bogus": torch.zeros(1)}), None, "bogus"),
    ],
)
def test_a_delta_that_is_not_what_it_says_is_refused(
    llava: Path, tmp_path: Path, file: str, change: Change, policies: Any, told: str
) -> None:
    from noria.errors import NoriaError

    save_delta(trained(load(llava), EYES), tmp_path / "delta", dict(EYES))
    wrong = respelled(tmp_path / "delta", tmp_path / "wrong", file, change, policies)
    with pytest.raises(NoriaError, match=told):
        merge(llava, [wrong], tmp_path / "merged")
    with pytest.raises(NoriaError, match=told):
        apply_deltas(load(llava), [wrong])
    assert not (tmp_path / "merged").exists()


def test_deltas_apply_in_the_order_of_their_names(llava: Path, tmp_path: Path) -> None:
    for seed, name in ((1, "02-b"), (2, "01-a"), (3, "10-c")):
        save_delta(trained(load(llava), SFT, seed), tmp_path / "adapter" / name, dict(SFT))
    assert [path.name for path in delta_folders(tmp_path / "adapter")] == ["01-a", "02-b", "10-c"]
    merge(llava, [tmp_path / "adapter"], tmp_path / "merged")
    last = load_file(tmp_path / "adapter" / "10-c" / FULL)
    got = dict(load(tmp_path / "merged").named_parameters())
    assert all(torch.equal(got[name], weight) for name, weight in last.items())
    with pytest.raises(TrainingError, match="no delta folder"):
        delta_folders(llava)
    shutil.copy(tmp_path / "adapter" / "01-a" / LORA, tmp_path / "adapter" / LORA)
    with pytest.raises(TrainingError, match="both a delta and a folder of deltas"):
        delta_folders(tmp_path / "adapter")


def test_tied_embeddings_that_are_stored_twice_stay_the_same(tmp_path: Path) -> None:
    model = random_model("llava", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "language_model.lm_head.weight": tensors[name].clone()}, file, metadata={"format": "pt"})
    policies: Policies = {"vision_tower": "frozen", "aligner": "frozen", "language_model": "full"}
    save_delta(trained(load(tmp_path / "tied"), policies), tmp_path / "delta", dict(policies))
    assert "lm_head.weight" not in load_file(tmp_path / "delta" / FULL)
    merge(tmp_path / "tied", [tmp_path / "delta"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(merged[name], tensors[name])
    assert torch.equal(merged[name], merged["language_model.lm_head.weight"])


def test_a_frozen_module_is_copied_from_the_parent_and_not_computed_again(llava: Path, tmp_path: Path) -> None:
    """As if the parent had been merged on a machine whose products differ in a last bit."""
    save_delta(trained(load(llava), LAST), tmp_path / "delta", dict(LAST))
    merge(llava, [tmp_path / "delta"], tmp_path / "parent")
    file = tmp_path / "parent" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(torch.inf))
    save_file(tensors, file, metadata={"format": "pt"})
    frozen: tuple[Module, ...] = ("aligner",)
    merge(llava, [tmp_path / "delta"], tmp_path / "child", parent=tmp_path / "parent", frozen=frozen)
    assert torch.equal(load_file(tmp_path / "child" / "model.safetensors")[name], tensors[name])
    merge(llava, [tmp_path / "delta"], tmp_path / "other", parent=tmp_path / "parent", frozen=())
    assert not torch.equal(load_file(tmp_path / "other" / "model.safetensors")[name], tensors[name])
