"""Module policies on tiny random models of every family: who trains, what is frozen, what a trainer is handed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from noria.errors import SettingsError, TrainingError
from noria.module_settings import ModulePolicies, ResolvedPolicy
from noria.records import MODULES, Module
from tests.families import FAMILIES, architecture, batch, tiny
from train.methods.frozen import roots
from train.methods.policies import Applied, apply_policies

Policies = dict[Module, ResolvedPolicy]
GENTLE = {"policy": "full", "learning_rate": 1e-6}
COMBINATIONS: dict[str, tuple[Any, Any, Any]] = {  # tower, aligner, language model
    "tower full, aligner full, LoRA": ("full", "full", "lora"),
    "tower full, aligner LoRA, LoRA": ("full", "lora", "lora"),
    "tower full, aligner frozen, LoRA": ("full", "frozen", "lora"),
    "tower alone": ("full", "frozen", "frozen"),
    "aligner alone": ("frozen", "full", "frozen"),
    "aligner full, LoRA": ("frozen", "full", "lora"),
    "LoRA alone": ("frozen", "frozen", "lora"),
    "language model full": ("frozen", "frozen", "full"),
    "everything at 1e-6": (GENTLE, GENTLE, GENTLE),
    "LoRA everywhere": ("lora", "lora", "lora"),
}


def policies(*stated: Any) -> Policies:
    """Resolved policies of tower, aligner and language model."""
    return ModulePolicies.model_validate(dict(zip(MODULES, stated, strict=True))).resolved()


def apply(model: Any, *stated: Any, **more: Any) -> Applied:
    torch.manual_seed(0)
    return apply_policies(model, architecture(model), policies(*stated), **more)


def owner(applied: Applied, name: str) -> Module:
    return applied.architecture.module_of(name)


def is_used(family: str, applied: Applied, name: str) -> bool:
    """Whether a forward reads a parameter: LLaVA takes the tower's hidden states before its last block."""
    behind = family in ("llava", "llava_next") and applied.architecture.block_of(name) == 1
    return applied.architecture.is_read(name) and not (behind and owner(applied, name) == "vision_tower")


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("stated", COMBINATIONS.values(), ids=list(COMBINATIONS))
def test_exactly_what_the_policies_say_learns(family: str, stated: tuple[Any, Any, Any]) -> None:
    """One real step: every trainable tensor gets a gradient and every module that trains changes, no other does."""
    model = tiny(family)
    applied = apply(model, *stated)
    optimizer = applied.optimizer(lr=0.0)  # the groups' own rates win over a default
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    model(**batch(family, model)).loss.backward()
    for name, parameter in model.named_parameters():
        asked = applied.policies[owner(applied, name)].policy
        assert parameter.requires_grad == (parameter.grad is not None), name
        learns = is_used(family, applied, name) if asked == "full" else ".lora_" in name
        assert parameter.requires_grad == learns, name
    optimizer.step()
    changed = {owner(applied, name) for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {module for module in MODULES if applied.policies[module].trains}
    applied.require_frozen()


def test_a_frozen_tower_hands_on_no_gradient_whatever_hooks_the_inputs(family: str) -> None:
    """transformers' `enable_input_require_grads` hooks patch embeddings too (Qwen2-VL); called before and after."""
    for before in (True, False):
        model = tiny(family)
        if before:
            model.enable_input_require_grads()
        applied = apply(model, "frozen", "full", "lora")
        if not before:
            model.enable_input_require_grads()
        inputs = batch(family, model)
        seen = _inputs_of_the_aligner(model)
        model.train()
        model(**inputs).loss.backward()
        assert seen
        assert not any(seen)
        assert sum(guard.calls for guard in applied.guards) > 0
        assert all(p.grad is None for n, p in model.named_parameters() if owner(applied, n) == "vision_tower")


def test_the_trap_is_real(family: str) -> None:
    """The control of the test above: `requires_grad_(False)` alone leaves the graph of a whole tower behind.

    In transformers 5.17 everywhere but on Qwen3-VL, whose tower gets no such hook.
    """
    model = tiny(family)
    inputs = batch(family, model)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    seen = _inputs_of_the_aligner(model)
    model(**inputs)
    assert any(seen) == (family != "qwen3_vl")


def _inputs_of_the_aligner(model: Any) -> list[bool]:
    """Fills up, in a forward, with whether what the aligner is given requires gradients."""
    seen: list[bool] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(t.requires_grad for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))

    for _, module in roots(model, architecture(model), ["aligner"]):
        module.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_frozen_modules_run_without_dropout_though_the_trainer_asks_for_training(family: str) -> None:
    model = tiny(family)
    applied = apply(model, "frozen", "full", "frozen")
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.5
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
        elif isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    inputs = batch(family, model)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    training = [
        path for path, one in model.named_modules() if one.training and dict(one.named_parameters(recurse=False))
    ]
    assert {owner(applied, f"{path}.weight") for path in training if path != "model"} == {"aligner"}


def test_the_last_block_of_the_tower_alone(family: str) -> None:
    """LLaVA takes the tower's hidden states before the last block, so its last block that can learn is the first."""
    model = tiny(family)
    applied = apply(model, {"policy": "full", "last_blocks": 1}, "frozen", "lora")
    model(**batch(family, model)).loss.backward()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None and owner(applied, n) == "vision_tower"}
    last = 0 if family in ("llava", "llava_next") else 1
    inside = {
        n
        for n, _ in model.named_parameters()
        if owner(applied, n) == "vision_tower" and applied.architecture.block_of(n) == last
    }
    assert learnt == inside != set()
    assert "full (last 1 blocks)" in applied.table()


def test_the_last_layer_of_the_language_model_by_lora() -> None:
    applied = apply(tiny("qwen2_vl"), "frozen", "frozen", {"policy": "lora", "last_blocks": 1, "targets": ["q_proj"]})
    assert applied.scopes["language_model"].linears == ("model.language_model.layers.1.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        (({"policy": "full", "last_blocks": 2}, "frozen", "lora"), "last_blocks=2: the vision_tower has 1 blocks"),
        (("frozen", {"policy": "lora", "targets": ["q_proj"]}, "lora"), "aligner has no such linear.*linear_1, linear"),
        (
            ("frozen", "frozen", {"policy": "lora", "targets": ["lm_head"]}),
            "targets=lm_head: the language_model has no",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(stated: tuple[Any, Any, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        apply(tiny("llava"), *stated)


def test_lora_goes_on_the_modules_own_linears_only(family: str) -> None:
    applied = apply(tiny(family), "lora", {"policy": "lora", "rank": 4, "alpha": 6, "dropout": 0.25}, "lora")
    for module in MODULES:
        assert applied.scopes[module].linears
        for path in applied.scopes[module].linears:
            layer = applied.model.get_submodule(path)
            assert owner(applied, f"{path}.weight") == module
            rank, alpha = (4, 6) if module == "aligner" else (16, 32)
            assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
            assert getattr(layer.lora_dropout["default"], "p", 0.0) == (0.25 if module == "aligner" else 0.0)
    heads = [name for name, _ in applied.model.named_parameters() if name.startswith("lm_head") and "lora" in name]
    assert heads == []


def test_the_groups_carry_each_modules_rate_and_decay() -> None:
    tower, aligner = {"policy": "full", "learning_rate": 2e-6, "weight_decay": 0.1}, {"policy": "full"}
    applied = apply(tiny("llava"), tower, aligner, {"policy": "lora", "learning_rate": 3e-4})
    told = [(group["module"], group["lr"], group["weight_decay"]) for group in applied.groups]
    assert told == [
        ("language_model", 3e-4, 0.0),
        ("aligner", 1e-5, 0.0),
        ("vision_tower", 2e-6, 0.1),
        ("vision_tower", 2e-6, 0.0),
    ]
    assert all(p.ndim > 1 for p in applied.groups[2]["params"])
    assert all(p.ndim == 1 for p in applied.groups[3]["params"])


def test_the_table() -> None:
    applied = apply(tiny("llava"), "frozen", "full", {"policy": "lora", "rank": 8, "learning_rate": 1e-4})
    lines = applied.table().splitlines()
    cells = [[cell for cell in line.split("  ") if cell] for line in lines]
    assert [cell.strip() for cell in cells[0]] == ["module", "policy", "parameters", "trainable", "learning rate"]
    sizes = dict.fromkeys(MODULES, 0)
    for name, parameter in tiny("llava").named_parameters():
        sizes[owner(applied, name)] += parameter.numel()
    lora = sum(p.numel() for name, p in applied.model.named_parameters() if ".lora_" in name)
    rows = [[cell.strip() for cell in line] for line in cells[1:]]
    assert rows == [
        ["vision_tower", "frozen", f"{sizes['vision_tower']:,}", "0", "-"],
        ["aligner", "full", f"{sizes['aligner']:,}", f"{sizes['aligner']:,}", "1e-05"],
        ["language_model", "lora r=8", f"{sizes['language_model']:,}", f"{lora:,}", "0.0001"],
    ]
    assert applied.trainable == sizes["aligner"] + lora


def test_an_optimiser_that_misses_or_adds_something_is_refused() -> None:
    applied = apply(tiny("llava"), "frozen", "full", "lora")
    lora = [p for n, p in applied.model.named_parameters() if ".lora_" in n]
    aligner = dict(applied.model.model.multi_modal_projector.named_parameters())
    with pytest.raises(TrainingError, match=r"does not hold 4 trainable.*multi_modal_projector") as missing:
        applied.require_covered(torch.optim.AdamW(lora))
    assert missing.value.code == "not_in_optimizer"
    frozen = applied.model.model.vision_tower.embeddings.class_embedding
    with pytest.raises(TrainingError, match=r"frozen: model\.vision_tower\.embeddings\.class_embedding") as extra:
        applied.require_covered(torch.optim.AdamW([*lora, *aligner.values(), frozen]))
    assert extra.value.code == "not_frozen"
    frozen.requires_grad_(True)  # someone turned it on behind the policies' back
    with pytest.raises(TrainingError, match="class_embedding"):
        applied.require_covered(torch.optim.AdamW([*lora, *aligner.values(), frozen]))


def test_a_frozen_tensor_that_changes_is_found_out() -> None:
    applied = apply(tiny("llava"), "frozen", "full", "lora")
    applied.model(**batch("llava", applied.model))
    applied.require_frozen()
    with torch.no_grad():
        applied.model.model.vision_tower.embeddings.class_embedding[0] += 1
    with pytest.raises(TrainingError, match=r"changed during training: vision_tower \(sha256:"):
        applied.require_frozen()


def test_pictures_that_went_around_the_tower_are_found_out() -> None:
    applied = apply(tiny("llava"), "frozen", "full", "lora")
    applied.require_frozen(pictures=False)
    with pytest.raises(TrainingError, match="never ran"):
        applied.require_frozen()


@pytest.mark.parametrize("stated", [("full", "full", "lora"), ("frozen", "full", "frozen")])
def test_checkpointing_changes_no_gradient(family: str, stated: tuple[Any, Any, Any]) -> None:
    grads = []
    for again in (False, True):
        model = tiny(family)
        applied = apply(model, *stated, checkpointing=again)
        model.train()
        model(**batch(family, model), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert applied.trainable > 0
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("module", MODULES)
def test_checkpointing_is_one_modules_own(module: Module) -> None:
    """What is checkpointed runs twice in a step, what is not runs once; a frozen decoder can be checkpointed too."""
    wanted: dict[Module, Any] = {m: {"policy": "full", "gradient_checkpointing": m == module} for m in MODULES}
    if module != "language_model":
        wanted["language_model"] = {"policy": "frozen", "gradient_checkpointing": False}
    model = tiny("qwen2_5_vl")
    apply(model, *(wanted[m] for m in MODULES))
    runs = dict.fromkeys(MODULES, 0)
    places: dict[Module, nn.Module] = {
        "vision_tower": model.model.visual.blocks[0].attn,
        "aligner": model.model.visual.merger.ln_q,
        "language_model": model.model.language_model.layers[0].self_attn,
    }

    def count(name: Module) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    inputs = batch("qwen2_5_vl", model)
    for name, place in places.items():
        place.register_forward_hook(count(name))
    model.train()
    model(**inputs, use_cache=False).loss.backward()
    assert runs == {m: 2 if m == module else 1 for m in MODULES}


def test_the_reference_is_the_model_without_its_lora() -> None:
    model = tiny("llava")
    inputs = batch("llava", model)
    with torch.no_grad():
        plain = model(**inputs).logits
        applied = apply(model, "frozen", "lora", "lora", checkpointing=True)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        changed = model(**inputs).logits
        with applied.reference():
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
            assert not model.is_gradient_checkpointing
        torch.testing.assert_close(model(**inputs).logits, changed, rtol=0, atol=0)
    assert model.is_gradient_checkpointing
    assert not torch.equal(changed, plain)


def test_what_trains_is_float32_over_a_model_of_half_the_bits(family: str) -> None:
    model = tiny(family).bfloat16()
    applied = apply(model, {"policy": "full", "last_blocks": 1}, "full", "lora")
    assert applied.mixed
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(family, model)).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
