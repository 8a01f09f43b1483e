"""A whole training on tiny models: what changes, what is frozen, what stops it, how an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import LeaseLost, SettingsError, TrainingError
from noria.module_settings import ModulePolicies
from noria.records import Json
from noria.sampling.records import Drawing
from tests.tiny_families import build_tiny_family
from tests.unit.grpo.material import Constant, losses, prompts, run, settings, worth
from tests.unit.grpo.sampler import TinySampler
from train.methods.frozen import tensor_hashes
from train.methods.grpo.method import GrpoReport
from train.methods.policy_model import load_policy, read_architecture
from train.stages.spec import Step, read_steps

Trained = tuple[Path, Path, TinySampler, GrpoReport, list[Step]]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four updates: checkpoint, folder, sampler, report, steps."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = build_tiny_family(folder / "vlm", request.param)
    sampler = TinySampler(checkpoint)
    return checkpoint, folder / "job", sampler, *run(checkpoint, sampler, folder / "job", settings(steps=4))


def test_the_adapter_that_samples_is_the_policy_that_trains(trained: Trained) -> None:
    """The sampler's plain numbers and the trainer's are the same after every update, so the ratio is 1."""
    _, _, sampler, _, steps = trained
    assert [step.step for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert step.metrics["ratio_min"] == pytest.approx(1.0, abs=1e-4)
        assert step.metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert step.metrics["divergence_absolute"] < 1e-4
        assert step.metrics["staleness"] == 0.0
    assert steps[0].metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    assert steps[3].metrics["kl"] > 0.01
    assert [name.rpartition("-")[2] for name in sampler.names] == ["u0", "u1", "u2", "u3"]
    assert len({name.rpartition("-")[0] for name in sampler.names}) == 1
    assert sampler.names[0].startswith("job_1-a1-")
    assert sampler.loaded == {}


def test_the_delta_is_a_lora_of_the_language_model_and_the_rest_is_frozen(trained: Trained) -> None:
    checkpoint, folder, _, report, _ = trained
    architecture = read_architecture(checkpoint)
    before = load_policy(checkpoint, [], architecture, torch.float32)
    after = load_policy(checkpoint, [folder / "adapter"], architecture, torch.float32)
    assert report.frozen == tensor_hashes(before, architecture)
    assert report.frozen == tensor_hashes(after, architecture)
    changed = {
        architecture.module_of(name)
        for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    assert changed == {"language_model"}
    assert report.trainable_parameters == sum(
        t.numel() for t in load_file(folder / "adapter/adapter_model.safetensors").values()
    )
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "log.jsonl"]


def test_the_report_adds_up(trained: Trained) -> None:
    _, folder, sampler, report, steps = trained
    assert (report.steps, report.prompts, report.answers) == (4, 8, 32)
    assert report.counts["used"] == report.counts["asked"] == 8
    assert report.rewards["telling"]["samples"] == 32
    assert report.reward_first == pytest.approx(steps[0].metrics["reward"])
    assert read_steps(folder / "log.jsonl") == steps
    lengths = [len(one.token_ids) for group in sampler.given[:2] for one in group.samples]
    assert steps[0].metrics["length"] == sum(lengths) / len(lengths)
    assert steps[0].tokens == sum(lengths)
    assert steps[0].metrics["cut"] == 0.25
    assert {"reward/telling", "reward_std", "entropy", "samples_per_s", "sampling_s", "training_s"} <= set(
        steps[0].metrics
    )


def test_what_is_rewarded_is_said_more_often(trained: Trained, tmp_path: Path) -> None:
    """One prompt, twenty updates; the same 48 seeds before and after."""
    checkpoint = trained[0]
    sampler = TinySampler(checkpoint, lengths=(2,))
    grpo = settings(steps=20, prompts_per_step=1, group_size=16, beta=0.0, max_tokens=2)
    run(checkpoint, sampler, tmp_path, grpo, asked=prompts(1), learning_rate=1e-3)
    asked = sampler.given[0].messages
    before = mean_worth(TinySampler(checkpoint, lengths=(2,)), asked)
    learnt = load_policy(checkpoint, [tmp_path / "adapter"], read_architecture(checkpoint), torch.float32)
    after = mean_worth(TinySampler(checkpoint, lengths=(2,), model=learnt), asked)
    assert after > before + 0.1


def mean_worth(sampler: TinySampler, messages: Sequence[Json]) -> float:
    """Of 48 answers."""
    (group,) = sampler.sample([messages], Drawing(n=48, max_tokens=2, seed=7))
    return sum(worth(one.text) for one in group.samples) / len(group.samples)


def same(one: Path, other: Path) -> bool:
    found = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("micro", [3, 8])
def test_the_cut_into_micro_batches_changes_nothing(trained: Trained, tmp_path: Path, micro: int) -> None:
    """Groups torn apart, and two groups of differing lengths in one forward; prompts not shared, too."""
    checkpoint, _, _, _, steps = trained
    for number, share in enumerate((True, False)):
        grpo = settings(steps=2, micro_batch_size=micro, share_prompts=share)
        _, found = run(checkpoint, TinySampler(checkpoint), tmp_path / str(number), grpo)
        assert losses(found) == pytest.approx(losses(steps[:2]), abs=1e-5)
        assert [one.grad_norm for one in found] == pytest.approx([one.grad_norm for one in steps[:2]], rel=1e-3)


def test_an_interrupted_training_goes_on_exactly(trained: Trained, tmp_path: Path) -> None:
    """Stopped in its fourth update, it goes on from the checkpoint after the second: same prompts, same seeds."""
    checkpoint = trained[0]
    grpo = settings(steps=5, checkpoint_every=2, schedule="linear", max_staleness=0)
    _, whole = run(checkpoint, TinySampler(checkpoint), tmp_path / "whole", grpo)
    sampler, heard = TinySampler(checkpoint), list[Step]()

    def cancelled() -> None:
        if len(heard) == 3:
            raise LeaseLost("killed", code="lease_lost")

    with pytest.raises(LeaseLost):
        run(checkpoint, sampler, tmp_path / "cut", grpo, check=cancelled, on_step=heard.append)
    assert sampler.loaded == {}
    assert not (tmp_path / "cut" / "adapter").exists()
    report, after = run(checkpoint, TinySampler(checkpoint), tmp_path / "cut", grpo)
    assert [step.step for step in after] == [3, 4, 5]
    assert losses(after) == losses(whole[2:])
    assert same(tmp_path / "cut", tmp_path / "whole")
    assert losses(read_steps(tmp_path / "cut" / "log.jsonl")) == losses(whole)
    assert (report.steps, report.prompts, report.counts["used"]) == (5, 10, 10)


def test_a_machine_that_stops_saves_its_last_update(trained: Trained, tmp_path: Path) -> None:
    checkpoint, heard = trained[0], list[Step]()
    grpo = settings(steps=3)

    def stopping() -> None:
        if len(heard) == 2:
            raise LeaseLost("the trainer is stopping", code="shutdown")

    sampler = TinySampler(checkpoint)
    with pytest.raises(LeaseLost, match="stopping"):
        run(checkpoint, sampler, tmp_path, grpo, check=stopping, on_step=heard.append)
    assert sampler.loaded == {}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    _, after = run(checkpoint, TinySampler(checkpoint), tmp_path, grpo)
    assert [step.step for step in after] == [3]


def test_a_machine_that_stops_while_it_samples_keeps_what_was_learnt(trained: Trained, tmp_path: Path) -> None:
    checkpoint, sampler = trained[0], TinySampler(trained[0])
    grpo = settings(steps=3, max_staleness=0)

    def stopping() -> None:
        if len(sampler.names) == 3:
            raise LeaseLost("the trainer is stopping", code="shutdown")

    with pytest.raises(LeaseLost, match="stopping"):
        run(checkpoint, sampler, tmp_path, grpo, check=stopping)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    _, whole = run(checkpoint, TinySampler(checkpoint), tmp_path / "whole", grpo)
    report, after = run(checkpoint, TinySampler(checkpoint), tmp_path, grpo)
    assert losses(after) == losses(whole[2:])  # the prompts of the update that was not made are asked again
    assert report.counts["asked"] == 6


def test_a_training_killed_behind_its_last_update_still_ends(trained: Trained, tmp_path: Path) -> None:
    """Its checkpoint is of the last update: nothing is left to train, the delta and the report are made."""
    checkpoint = trained[0]
    grpo = settings(steps=2, checkpoint_every=1)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise OSError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.methods.grpo.method.save_delta", killed)
        with pytest.raises(OSError, match="killed"):
            run(checkpoint, TinySampler(checkpoint), tmp_path, grpo)
    sampler = TinySampler(checkpoint)
    report, steps = run(checkpoint, sampler, tmp_path, grpo)
    assert (report.steps, steps, sampler.names) == (2, [], [])
    assert report.loss_last == read_steps(tmp_path / "log.jsonl")[-1].loss
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_engine_and_trainer_too_far_apart_stop_before_the_update(trained: Trained, tmp_path: Path) -> None:
    checkpoint = trained[0]
    noise = (1.0, -1.0)
    k3 = sum(torch.tensor(x).exp().item() - 1 - x for x in (-1.0, 1.0)) / 2
    for kind, bound, found in (("k3", 0.5, k3), ("absolute", 0.9, 1.0)):
        heard: list[Step] = []
        sampler = TinySampler(checkpoint, noise=noise, lengths=(4,))
        grpo = settings(divergence=kind, max_divergence=bound)
        with pytest.raises(TrainingError, match=rf"differ by {found:.3g}.* nats a token \({kind}\).*={bound}") as why:
            run(checkpoint, sampler, tmp_path / kind, grpo, on_step=heard.append)
        assert (why.value.code, heard, sampler.loaded) == ("diverged", [], {})
        assert not (tmp_path / kind / "adapter").exists()
        allowed = settings(divergence=kind, max_divergence=2.0, steps=1)
        _, steps = run(checkpoint, TinySampler(checkpoint, noise=noise, lengths=(4,)), tmp_path / f"{kind}-2", allowed)
        assert steps[0].metrics["divergence"] == pytest.approx(k3, abs=1e-4)
        assert steps[0].metrics["divergence_absolute"] == pytest.approx(1.0, abs=1e-4)


def test_rewards_that_tell_nothing_apart_end_with_words(trained: Trained, tmp_path: Path) -> None:
    sampler = TinySampler(trained[0])
    with pytest.raises(TrainingError, match="no group to learn from in 3 rounds of 2 prompts") as why:
        run(trained[0], sampler, tmp_path, settings(), reward=Constant())
    assert (why.value.code, sampler.loaded) == ("no_signal", {})


@pytest.mark.parametrize(
    "modules", [{"aligner": "full"}, {"language_model": {"dropout": 0.1}}, {"only": "language_model"}]
)
def test_what_no_adapter_can_hold_is_refused(trained: Trained, tmp_path: Path, modules: dict[str, Any]) -> None:
    stated = {key: value for key, value in modules.items() if key != "only"}
    asked = ModulePolicies.model_validate(stated).resolved(only=modules.get("only"))
    with pytest.raises(SettingsError, match=r"train\.modules\.\w+\.(policy|dropout)=.* contradicts GRPO"):
        run(trained[0], TinySampler(trained[0]), tmp_path, settings(), policies=asked)


def test_two_trainings_are_the_same_to_the_last_bit(trained: Trained, tmp_path: Path) -> None:
    checkpoint, folder, _, _, steps = trained
    _, again = run(checkpoint, TinySampler(checkpoint), tmp_path, settings(steps=4))
    assert losses(again) == losses(steps)
    assert same(tmp_path, folder)
    _, other = run(checkpoint, TinySampler(checkpoint), tmp_path / "other", settings(steps=1, seed=5))
    assert other[0].metrics["reward"] != steps[0].metrics["reward"]
    assert json.loads((folder / "adapter" / "modules.json").read_text())["language_model"]["policy"] == "lora"


def test_bfloat16_learns_as_float32(trained: Trained, tmp_path: Path) -> None:
    """Autocast over float32 weights, with attention that is written out; the engine is as near as rounding allows."""
    checkpoint, _, _, _, steps = trained
    grpo = settings(steps=2, precision="bfloat16")
    report, found = run(checkpoint, TinySampler(checkpoint), tmp_path / "half", grpo, dtype=None)
    assert report.dtype == "float32"
    assert found[0].metrics["reward"] == steps[0].metrics["reward"]  # the same samples
    assert found[0].metrics["entropy"] == pytest.approx(steps[0].metrics["entropy"], abs=0.02)
    assert 1e-4 < found[0].metrics["divergence_absolute"] < 0.05
    assert found[0].grad_norm == pytest.approx(steps[0].grad_norm, rel=0.1)
    with pytest.raises(TrainingError, match=r"grpo\.precision='bfloat16' would be ignored: train\.base='gptq' decides"):
        run(checkpoint, TinySampler(checkpoint), tmp_path / "odd", grpo, dtype=None, base="gptq")
