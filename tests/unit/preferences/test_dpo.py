"""DPO on a tiny random LLaVA: TRL's loss against the paper's formula, what is frozen, and what stops a training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import transformers
from safetensors.torch import load_file

from noria.errors import LeaseLost, TrainingError
from noria.settings import TrainSettings
from tests.flow.rtn import quantize_rtn
from tests.unit.broken import poisoned, with_nan
from tests.unit.preferences.material import load_image, text_pairs, token_logps
from train.data.pairs import TextPair
from train.methods.frozen import FrozenModule, require_equal
from train.methods.policies import apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.methods.preferences.method import MethodReport, train_method
from train.methods.preferences.steps import Step


@pytest.fixture(scope="module")
def pairs(tiny_vlm: Path) -> list[TextPair]:
    return text_pairs(tiny_vlm, 6)


def settings(modules: dict[str, Any] | None = None, **dpo: Any) -> TrainSettings:
    asked = {"epochs": 3, "batch_size": 6, "micro_batch_size": 3, "warmup_ratio": 0.0, **dpo}
    lora = {"language_model": {"rank": 4, "alpha": 8, "learning_rate": 2e-3}}
    return TrainSettings.model_validate({"dpo": asked, "modules": lora if modules is None else modules})


def run(
    master: Path,
    pairs: Sequence[TextPair],
    out: Path,
    asked: TrainSettings | None = None,
    adapters: Sequence[Path] = (),
    check: Callable[[], None] = lambda: None,
    **more: Any,
) -> tuple[MethodReport, list[Step]]:
    """Trains in float32, so that tolerances say something about the formula and not about rounding."""
    steps: list[Step] = []
    asked = asked or settings()
    report = train_method(
        master,
        adapters,
        pairs,
        load_image,
        out,
        asked.dpo,
        asked.policies(),
        on_step=steps.append,
        check=check,
        **{"dtype": torch.float32, **more},
    )
    return report, steps


@pytest.fixture(scope="module")
def trained(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, MethodReport, list[Step]]:
    """One training over pictures and text in the same batches."""
    out = tmp_path_factory.mktemp("dpo") / "adapter"
    return out, *run(tiny_vlm, pairs, out)


def test_the_first_loss_is_ln_2_and_an_overfit_batch_goes_down(trained: tuple[Path, MethodReport, list[Step]]) -> None:
    _, report, steps = trained
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0].margin == 0.0
    assert len(steps) == report.steps == 3
    assert steps[-1].loss < 0.5
    assert steps[-1].margin is not None
    assert steps[-1].margin > 0.3
    assert report.loss_last == steps[-1].loss
    assert all(math.isfinite(step.grad_norm) and step.grad_norm > 0 for step in steps)


def paper_loss(policy: Any, reference: Any, processor: Any, pairs: Sequence[TextPair], beta: float) -> float:
    """Equation 7 of the paper, averaged over pairs."""

    def logp(model: Any, one: TextPair, answer: str) -> float:
        with torch.no_grad():
            return float(token_logps(model, processor, one.prompt, one.images, answer).sum())

    losses = []
    for one in pairs:
        ratios = [logp(policy, one, text) - logp(reference, one, text) for text in (one.chosen, one.rejected)]
        losses.append(-math.log(1 / (1 + math.exp(-beta * (ratios[0] - ratios[1])))))
    return sum(losses) / len(losses)


def test_the_loss_is_the_papers(
    tiny_vlm: Path, pairs: list[TextPair], trained: tuple[Path, MethodReport, list[Step]], tmp_path: Path
) -> None:
    """All six pairs are one step, so step 2 runs on the weights after step 1: a run of one step has those weights.

    Tolerance 1e-4 nats: the same sums in float32 with and without padding.
    """
    _, _, steps = trained
    one_step = settings()
    one_step = one_step.model_copy(update={"dpo": one_step.dpo.model_copy(update={"epochs": 1})})
    run(tiny_vlm, pairs, tmp_path / "one", one_step)
    architecture, processor = read_architecture(tiny_vlm), load_processor(tiny_vlm)
    reference = load_policy(tiny_vlm, [], architecture, torch.float32)
    policy = load_policy(tiny_vlm, [tmp_path / "one"], architecture, torch.float32)
    expected = paper_loss(policy, reference, processor, pairs, beta=0.1)
    assert expected < math.log(2) - 0.01
    assert steps[1].loss == pytest.approx(expected, abs=1e-4)


def test_the_lineage_is_folded_in_so_training_starts_from_the_parent(
    tiny_vlm: Path, pairs: list[TextPair], trained: tuple[Path, MethodReport, list[Step]], tmp_path: Path
) -> None:
    adapter, _, _ = trained
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_vlm, dtype=torch.float32)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    folded = load_policy(tiny_vlm, [adapter], read_architecture(tiny_vlm), torch.float32)
    for (name, ours), (_, theirs) in zip(folded.named_parameters(), merged.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=name)
    _, steps = run(tiny_vlm, pairs, tmp_path / "next", settings(epochs=1), adapters=[adapter])
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6)


def test_only_the_language_models_linears_learn(trained: tuple[Path, MethodReport, list[Step]], tiny_vlm: Path) -> None:
    adapter, report, _ = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # A and B of seven linears in two layers
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == report.trainable_parameters
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 14
    files = ["adapter_config.json", "adapter_model.safetensors", "modules.json"]
    assert sorted(path.name for path in adapter.iterdir()) == files
    assert [path for path in adapter.parent.iterdir() if path.name.startswith(".trl-")] == []


def test_tower_and_aligner_are_hashed_and_unchanged(trained: tuple[Path, MethodReport, list[Step]]) -> None:
    _, report, _ = trained
    assert sorted(report.frozen) == ["aligner", "vision_tower"]
    assert all(value.startswith("sha256:") and len(value) == 71 for value in report.frozen.values())
    require_equal(report.frozen, dict(report.frozen), "here")
    with pytest.raises(TrainingError, match=r"frozen modules changed here: aligner"):
        require_equal(report.frozen, {**report.frozen, "aligner": "sha256:0"}, "here")


def test_the_frozen_tower_keeps_no_graph_even_when_inputs_require_gradients(tiny_vlm: Path) -> None:
    architecture = read_architecture(tiny_vlm)
    model = load_policy(tiny_vlm, [], architecture, torch.float32)
    guards = apply_policies(model, architecture, settings().policies()).guards
    assert sorted(guard.path for guard in guards) == ["model.multi_modal_projector", "model.vision_tower"]
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    output = model.model.vision_tower(pixels)
    assert not output.last_hidden_state.requires_grad
    assert [guard.calls for guard in guards if guard.path == "model.vision_tower"] == [1]
    assert all((".lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_a_frozen_module_that_hands_on_a_gradient_ends_the_training() -> None:
    leaky = torch.nn.Linear(2, 2)  # nothing runs it under no_grad
    FrozenModule("model.vision_tower", leaky)
    with pytest.raises(TrainingError, match=r"model\.vision_tower is frozen but its output carries a gradient"):
        leaky(torch.zeros(1, 2))


def test_the_same_snapshot_and_seed_give_the_same_bytes(
    tiny_vlm: Path, pairs: list[TextPair], trained: tuple[Path, MethodReport, list[Step]], tmp_path: Path
) -> None:
    first, _, steps = trained
    _, again = run(tiny_vlm, pairs, tmp_path / "again")
    assert again == steps
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()
    _, other = run(tiny_vlm, pairs, tmp_path / "other", settings(seed=1))
    assert other[-1].loss != steps[-1].loss


def test_a_non_finite_loss_stops_before_the_step_and_names_the_batch(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path
) -> None:
    steps: list[Step] = []
    with pytest.raises(TrainingError, match=r"loss nan is not finite; stopped before the optimiser step") as stopped:
        train_method(
            with_nan(tiny_vlm, tmp_path / "broken"),
            [],
            [replace(one, id=f"pref_nan_{n}") for n, one in enumerate(pairs[:2])],
            load_image,
            tmp_path / "adapter",
            settings(batch_size=2, micro_batch_size=2).dpo,
            settings().policies(),
            on_step=steps.append,
            check=lambda: None,
            dtype=torch.float32,
        )
    assert stopped.value.code == "non_finite"
    assert "pref_nan_0" in stopped.value.message
    assert "pref_nan_1" in stopped.value.message
    assert steps == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_non_finite_gradient_stops_before_the_step(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.methods.preferences.method.load_policy", poisoned)
    with pytest.raises(TrainingError, match=r"gradient of .*lora_.* is not finite.*batch: pref_\d, pref_\d") as stopped:
        run(tiny_vlm, pairs, tmp_path / "adapter")
    assert stopped.value.code == "non_finite"
    assert list(tmp_path.iterdir()) == []


def test_cancelling_stops_between_micro_batches(tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise LeaseLost("job job_1 is to be cancelled", code="cancelled")

    with pytest.raises(LeaseLost):
        run(tiny_vlm, pairs, tmp_path / "adapter", check=check)
    assert list(tmp_path.iterdir()) == []


def test_the_adapters_dropout_is_the_one_asked_for(
    tiny_vlm: Path, pairs: list[TextPair], trained: tuple[Path, MethodReport, list[Step]], tmp_path: Path
) -> None:
    asked = settings({"language_model": {"rank": 4, "alpha": 8, "learning_rate": 2e-3, "dropout": 0.5}})
    _, _, steps = trained
    _, dropped = run(tiny_vlm, pairs, tmp_path / "adapter", asked)
    assert dropped[-1].loss != steps[-1].loss


FULL = {"policy": "full", "learning_rate": 1e-3}
LORA = {"policy": "lora", "rank": 4, "alpha": 8, "learning_rate": 2e-3}


@pytest.mark.parametrize(
    "modules",
    [
        {"aligner": FULL, "language_model": LORA},
        {"aligner": LORA, "language_model": LORA},
        {"language_model": FULL},
        {"aligner": FULL, "language_model": {**FULL, "last_blocks": 1}},
    ],
    ids=["aligner full", "aligner LoRA", "language model full", "both full, the last layer"],
)
def test_other_modules_learn_from_preferences_too(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path, modules: dict[str, Any]
) -> None:
    """The reference is the untrained policy also where its weights train in full, so LoRA off does not give it back."""
    _, steps = run(tiny_vlm, pairs, tmp_path / "three", settings(modules))
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1].loss < 0.6
    report, _ = run(tiny_vlm, pairs, tmp_path / "one", settings(modules, epochs=1))
    trained = {row.module: row.trainable > 0 for row in report.modules}
    assert trained == {"vision_tower": False, "aligner": "aligner" in modules, "language_model": True}
    assert sorted(report.frozen) == ["vision_tower"] if "aligner" in modules else ["aligner", "vision_tower"]
    architecture, processor = read_architecture(tiny_vlm), load_processor(tiny_vlm)
    reference = load_policy(tiny_vlm, [], architecture, torch.float32)
    policy = load_policy(tiny_vlm, [tmp_path / "one"], architecture, torch.float32)
    assert steps[1].loss == pytest.approx(paper_loss(policy, reference, processor, pairs, beta=0.1), abs=1e-4)
    changed = {
        architecture.module_of(name)
        for (name, ours), theirs in zip(policy.named_parameters(), reference.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    assert changed == ({"aligner", "language_model"} if "aligner" in modules else {"language_model"})


def test_a_lora_learnt_on_our_own_4_bit_checkpoint_goes_on_the_master(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path
) -> None:
    """QLoRA: the reference is the 4-bit model, the delta a LoRA like any other, and nothing packed is written."""
    quantize_rtn(tiny_vlm, tmp_path / "serving")
    before = (tmp_path / "serving" / "model.safetensors").read_bytes()
    _, steps = run(tiny_vlm, pairs, tmp_path / "adapter", base="gptq", serving=tmp_path / "serving")
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1].loss < 0.5
    assert (tmp_path / "serving" / "model.safetensors").read_bytes() == before
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 2 * 7 * 2
    architecture, processor = read_architecture(tiny_vlm), load_processor(tiny_vlm)
    master = load_policy(tiny_vlm, [], architecture, torch.float32)
    merged = load_policy(tiny_vlm, [tmp_path / "adapter"], architecture, torch.float32)
    assert paper_loss(merged, master, processor, pairs, beta=0.1) < 0.6


@pytest.mark.parametrize("base", ["master", "gptq"])
def test_over_a_model_of_half_the_bits_what_trains_is_float32(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path, base: str
) -> None:
    """As on a GPU: bfloat16 weights, the aligner raised to float32, the forward under autocast."""
    quantize_rtn(tiny_vlm, tmp_path / "serving")
    asked = settings({"aligner": FULL, "language_model": LORA})
    more: dict[str, Any] = {"base": base, "serving": tmp_path / "serving", "dtype": torch.bfloat16}
    report, steps = run(tiny_vlm, pairs, tmp_path / "adapter", asked, **more)
    assert report.dtype == "bfloat16"
    assert steps[0].loss == pytest.approx(math.log(2), abs=5e-3)  # the reference ran in other batches
    assert steps[-1].loss < 0.6
    full = load_file(tmp_path / "adapter" / "full.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert {name.rsplit(".", 2)[0] for name in full} == {"model.multi_modal_projector"}


def test_the_policies_in_force_are_shown_before_the_first_step(
    tiny_vlm: Path, pairs: list[TextPair], tmp_path: Path
) -> None:
    told: list[str] = []

    def stop() -> None:
        raise LeaseLost("enough was seen", code="cancelled")

    with pytest.raises(LeaseLost):
        run(tiny_vlm, pairs, tmp_path / "adapter", check=stop, on_ready=lambda applied: told.append(applied.table()))
    assert "language_model" in told[0]
    assert "lora r=4" in told[0]
