"""The loss of an update equals the papers' formulas, written out here token by token in float64.

The reference runs each sequence alone, with full logits, on models loaded anew. Tolerance 2e-5: losses are of the order
of 0.1 and sums of some thirty terms in float32 on one side.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from noria.methods.grpo import GrpoSettings
from noria.sampling.records import Group as Sampled
from tests.tiny_families import build_tiny_family
from tests.unit.grpo.material import run, settings, worth
from tests.unit.grpo.sampler import TinySampler, answer_logps
from train.methods.policy_model import load_policy, read_architecture
from train.stages.spec import Step

TOLERANCE = 2e-5
NOISE = (0.4, -0.3, 0.05, -0.9, 0.0, 0.7, -0.1)  # what the engine's log-probabilities are off by
RATE = 6e-3  # so large that the second pass is clipped


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family."""
    return {family: build_tiny_family(tmp_path_factory.mktemp(family), family) for family in ("llava", "qwen2_5_vl")}


def passes(checkpoint: Path, folder: Path, grpo: GrpoSettings) -> tuple[list[Step], list[Sampled], list[Any]]:
    """Two updates on one batch; its groups as they were sampled; the models before the first and the second."""
    sampler = TinySampler(checkpoint, noise=NOISE)
    _, steps = run(checkpoint, sampler, folder / "two", grpo, learning_rate=RATE)
    one = grpo.model_copy(update={"steps": 1})
    run(checkpoint, TinySampler(checkpoint, noise=NOISE), folder / "one", one, learning_rate=RATE)
    architecture = read_architecture(checkpoint)
    before = load_policy(checkpoint, [], architecture, torch.float32)
    after = load_policy(checkpoint, [folder / "one" / "adapter"], architecture, torch.float32)
    given = sorted(sampler.given[: grpo.prompts_per_step], key=lambda group: group.prompt)
    return steps, given, [before, after]


def advantages(groups: list[Sampled], grpo: GrpoSettings) -> list[list[float]]:
    """(r - mean) / (std + 1e-4), by group; by the whole batch's deviation; or the difference alone (Dr. GRPO)."""
    rewards = [[worth(one.text) for one in group.samples] for group in groups]
    whole = statistics.stdev([reward for group in rewards for reward in group])
    found = []
    for group in rewards:
        scale = {"group": statistics.stdev(group) + 1e-4, "batch": whole + 1e-4, "none": 1.0}[grpo.scale_rewards]
        found.append([(reward - statistics.mean(group)) / scale for reward in group])
    return found


def correction(old: torch.Tensor, engine: torch.Tensor, grpo: GrpoSettings) -> torch.Tensor:
    """pi_trainer / pi_engine, of each token or their product, truncated or masked."""
    if grpo.importance_sampling == "none":
        return torch.ones_like(old)
    level, bound = grpo.importance_sampling.split("_")
    ratio = (old - engine).exp() if level == "token" else (old - engine).sum().exp().expand(len(old))
    low, high = grpo.importance_low or 0.0, grpo.importance_high or math.inf
    if bound == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def token_losses(
    now: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, engine: torch.Tensor, advantage: float, grpo: GrpoSettings
) -> torch.Tensor:
    """One answer's: -w min(ratio A, clip(ratio) A) + beta KL, KL by k3 (DeepSeekMath, eq. 3 and 4); CISPO's for it."""
    ratio = (now - old).exp()
    if grpo.ratio_level == "sequence":  # GSPO, eq. 7
        ratio = (now - old).mean().exp().expand(len(now))
    if grpo.loss_type == "cispo":  # MiniMax-M1, eq. 4
        gain = ratio.clamp(max=grpo.epsilon_high) * advantage * now
    elif grpo.loss_type == "sapo":  # eq. 6: a gate in place of a clip, 1.0 and 1.05 its temperatures
        tau = 1.0 if advantage > 0 else 1.05
        gain = torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    elif grpo.loss_type == "vespo":  # phi(w) = e^l w^k e^(-l w), w of the whole answer and the engine's part in it
        k, pull = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        w = ((now - old).sum() + correction(old, engine, grpo).log().sum()).exp()
        return -(pull + k * w.log() - pull * w).exp() * advantage * now + grpo.beta * _kl(now, old, ref, grpo)
    else:
        clipped = ratio.clamp(1 - grpo.epsilon_low, 1 + grpo.epsilon_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
    return -correction(old, engine, grpo) * gain + grpo.beta * _kl(now, old, ref, grpo)


def _kl(now: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, grpo: GrpoSettings) -> torch.Tensor:
    """k3 of each token; unbiased, times the ratio."""
    kl = (ref - now).exp() - (ref - now) - 1
    ratio = (now - old).exp() if grpo.ratio_level == "token" else (now - old).mean().exp()
    return kl * ratio if grpo.unbiased_kl else kl


def reference(groups: list[Sampled], models: list[Any], number: int, sampler: Any, grpo: GrpoSettings) -> float:
    """The loss of the `number`-th pass."""
    answers = []
    for group, values in zip(groups, advantages(groups, grpo), strict=True):
        inputs = sampler.inputs(group.messages)
        assert tuple(inputs["input_ids"][0].tolist()) == group.prompt_token_ids
        for one, advantage in zip(group.samples, values, strict=True):
            now, old = (answer_logps(models[at], inputs, one.token_ids, grpo.temperature) for at in (number, 0))
            engine = torch.tensor(one.logprobs, dtype=torch.float64)
            answers.append(token_losses(now, old, old, engine, advantage, grpo))
    tokens = sum(len(one) for one in answers)
    if grpo.loss_type in ("grpo", "sapo"):  # 1/G sum over answers of 1/|o| sum over tokens
        return float(sum(one.mean() for one in answers) / len(answers))
    if grpo.loss_type == "luspo":  # an answer counts by its length
        return float(sum(one.sum() for one in answers) / len(answers))
    if grpo.loss_type == "dr_grpo":  # a constant in place of |o|
        return float(sum(one.sum() for one in answers) / (len(answers) * grpo.max_tokens))
    assert grpo.loss_type in ("dapo", "cispo", "bnpo", "vespo")
    return float(sum(one.sum() for one in answers) / tokens)


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "importance_sampling": "none"},
    "grpo, tokens truncated": {"loss_type": "grpo", "importance_high": 1.2},
    "grpo, answers masked": {
        "loss_type": "grpo",
        "importance_sampling": "sequence_mask",
        "importance_low": 0.6,
        "importance_high": 1.3,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "importance_sampling": "none"},
    "dr_grpo, answers truncated": {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "importance_sampling": "sequence_truncate",
        "importance_low": 0.8,
        "importance_high": 1.3,
    },
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "importance_sampling": "none", "beta": 0.0},
    "dapo, tokens masked": {
        "loss_type": "dapo",
        "importance_sampling": "token_mask",
        "importance_low": 0.8,
        "importance_high": 1.3,
        "unbiased_kl": False,
    },
    "dapo, temperature": {"loss_type": "dapo", "temperature": 0.7, "scale_rewards": "batch"},
    "bnpo": {"loss_type": "bnpo", "micro_batch_size": 8},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"loss_type": "grpo", "ratio_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "ratio_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "vespo": {"loss_type": "vespo", "importance_high": 1.4},
}


QWEN = ("grpo, tokens truncated", "dr_grpo, answers truncated", "dapo, tokens masked", "dapo, temperature", "cispo")


@pytest.mark.parametrize(
    ("family", "case"), [*(("llava", case) for case in CASES), *(("qwen2_5_vl", case) for case in QWEN)]
)
def test_the_loss_is_the_papers(checkpoints: dict[str, Path], tmp_path: Path, family: str, case: str) -> None:
    checkpoint = checkpoints[family]
    told = {"beta": 0.3, "epsilon_low": 0.05, "epsilon_high": 0.08, "iterations": 2, **CASES[case]}
    grpo = settings(**told)
    steps, groups, models = passes(checkpoint, tmp_path, grpo)
    sampler = TinySampler(checkpoint)
    expected = [reference(groups, models, number, sampler, grpo) for number in (0, 1)]
    assert [step.loss for step in steps] == pytest.approx(expected, abs=TOLERANCE)
    assert abs(expected[0] - expected[1]) > 100 * TOLERANCE
    if grpo.loss_type not in ("sapo", "vespo"):
        assert steps[1].metrics["clipped"] > 0
    assert [step.metrics["staleness"] for step in steps] == [0.0, 1.0]
    if grpo.importance_sampling != "none":
        assert steps[0].metrics["ratio_outside"] > 0
    if grpo.beta:
        assert steps[0].metrics["kl"] == pytest.approx(0.0, abs=1e-9)
        assert steps[1].metrics["kl"] > 0.01
