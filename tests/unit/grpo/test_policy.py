"""The policy as an adapter: what the engine gets is what trains, and what the job's earlier stages learnt with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import Conflict, Unavailable
from noria.module_settings import ModulePolicies
from serve.sampling.adapters.validate import check_adapter, linears_of
from tests.unit.grpo.material import policies
from tests.unit.grpo.sampler import TinySampler
from train.methods.delta import LORA, LORA_CONFIG, save_delta
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.policy import Policy, earlier_factors, factors, write_adapter
from train.methods.policies import Applied, apply_policies
from train.methods.policy_model import load_policy, read_architecture


def applied(checkpoint: Path, seed: int, deltas: list[Path] | None = None, **lora: Any) -> Applied:
    """A LoRA with numbers in both factors, as after some updates."""
    torch.manual_seed(seed)
    architecture = read_architecture(checkpoint)
    model = load_policy(checkpoint, deltas or [], architecture, torch.float32)
    stated = {"language_model": {"rank": 4, "alpha": 8, "learning_rate": 1e-3, **lora}}
    made = apply_policies(model, architecture, ModulePolicies.model_validate(stated).resolved())
    with torch.no_grad():
        for name, one in made.model.named_parameters():
            if ".lora_B." in name:
                one.normal_(0.0, 0.05)
    return made


def delta(checkpoint: Path, out: Path, seed: int, **lora: Any) -> Path:
    """An earlier stage's."""
    made = applied(checkpoint, seed, **lora)
    save_delta(made.model, out, {module: policy.record() for module, policy in made.policies.items()})
    return out


def logits(model: Any, checkpoint: Path) -> torch.Tensor:
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_two_stages_are_one_adapter_of_the_sum_of_their_ranks(tiny_vlm: Path, tmp_path: Path) -> None:
    """The base with the adapter answers as the model with the earlier delta folded in and the LoRA on it.

    The earlier one has another rank and scale, and not every linear; missing rows are zeros.
    """
    first = delta(tiny_vlm, tmp_path / "first", 1, rank=2, alpha=6, targets=["q_proj", "down_proj"])
    policy = applied(tiny_vlm, 2, [first])
    earlier = earlier_factors([first], policy.architecture)
    assert {name.rpartition(".")[2] for name in earlier} == {"q_proj", "down_proj"}
    assert write_adapter([earlier, factors(policy)], tmp_path / "adapter") == 6
    config = json.loads((tmp_path / "adapter" / LORA_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (6, 6, 14)
    sampler = TinySampler(tiny_vlm)
    sampler._set(load_file(tmp_path / "adapter" / LORA))
    torch.testing.assert_close(logits(sampler.model, tiny_vlm), logits(policy.model, tiny_vlm), atol=2e-5, rtol=1e-5)
    base = logits(load_policy(tiny_vlm, [], policy.architecture, torch.float32), tiny_vlm)
    assert float((base - logits(policy.model, tiny_vlm)).abs().max()) > 0.1


def test_the_server_takes_what_is_written(tiny_vlm: Path, tmp_path: Path) -> None:
    """Its own check of every byte, over the very checkpoint."""
    write_adapter([factors(applied(tiny_vlm, 2))], tmp_path)
    assert check_adapter(tmp_path, linears_of(tiny_vlm), 16) == 4


def test_what_is_no_lora_of_the_language_model_is_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    architecture = read_architecture(tiny_vlm)
    model = load_policy(tiny_vlm, [], architecture, torch.float32)
    stated = ModulePolicies.model_validate({"aligner": "full", "language_model": "frozen"}).resolved()
    made = apply_policies(model, architecture, stated)
    save_delta(made.model, tmp_path / "eyes", {module: policy.record() for module, policy in stated.items()})
    with pytest.raises(Conflict, match=r"an earlier stage trained model\.multi_modal_projector\..*Roll that") as why:
        earlier_factors([tmp_path / "eyes"], architecture)
    assert why.value.code == "not_an_adapter"
    assert earlier_factors([], architecture) == {}


def made_policy(checkpoint: Path, folder: Path, sampler: Any, told: list[str]) -> Policy:
    patience = Patience("v1", 0.0, lambda: None)
    return Policy(
        sampler,
        applied(checkpoint, 2),
        {},
        patience,
        version="v1",
        prefix="job_1-a2-abc",
        folder=folder,
        tell=told.append,
    )


def test_one_adapter_at_a_time_and_none_afterwards(tiny_vlm: Path, tmp_path: Path) -> None:
    sampler, told = TinySampler(tiny_vlm), list[str]()
    policy = made_policy(tiny_vlm, tmp_path / "policy", sampler, told)
    for update in (0, 3):
        policy.put(update)
        assert list(sampler.loaded) == [policy.name] == [f"job_1-a2-abc-u{update}"]
    policy.delete()
    policy.delete()
    assert (sampler.loaded, told, (tmp_path / "policy").exists()) == ({}, [], False)


def test_what_a_killed_attempt_left_is_deleted_by_its_name(tiny_vlm: Path, tmp_path: Path) -> None:
    sampler, told = TinySampler(tiny_vlm), list[str]()
    made_policy(tiny_vlm, tmp_path / "policy", sampler, told).put(5)
    assert list(sampler.loaded) == ["job_1-a2-abc-u5"]
    made_policy(tiny_vlm, tmp_path / "policy", sampler, told).delete_left()
    assert sampler.loaded == {}
    made_policy(tiny_vlm, tmp_path / "policy", sampler, told).delete_left()
    assert told == []


def test_an_adapter_that_cannot_be_deleted_is_told_and_stops_nothing(tiny_vlm: Path, tmp_path: Path) -> None:
    class Gone(TinySampler):
        def delete_adapter(self, name: str) -> None:
            raise Unavailable("nobody answers")

    sampler, told = Gone(tiny_vlm), list[str]()
    policy = made_policy(tiny_vlm, tmp_path / "policy", sampler, told)
    policy.put(0)
    policy.delete()
    assert told == ["adapter job_1-a2-abc-u0 could not be deleted, its lease will end it: nobody answers"]
    assert policies()["language_model"].rank == 4
