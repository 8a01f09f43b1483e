"""Every method's loss on a fixed batch, and its gradient, against the paper's formula written out here.

The references run one sequence at a time through plain logits in float64, in the order of the papers' symbols: p is the
policy's log-probability of each token of an answer, q the reference's. Tolerance: 1e-4 of the loss and 1e-3 of the
gradient's length, which is what padding and float32 leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from noria.methods.table import PreferenceMethod
from tests.tiny_families import build_tiny_family
from tests.unit.preferences.material import Moved, kto_paper, moved, settings, text_pairs, text_thumbs
from train.data.pairs import TextPair, TextThumb
from train.methods.preferences.pairs import PairTrainer

COUNT = 4


@dataclass(frozen=True)
class One:
    """A pair: log-probabilities (T,) of the chosen and the rejected answer's tokens, policy's p and reference's q."""

    p_chosen: torch.Tensor
    p_rejected: torch.Tensor
    q_chosen: torch.Tensor
    q_rejected: torch.Tensor

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log (policy / reference) of the whole answers."""
        return self.p_chosen.sum() - self.q_chosen.sum(), self.p_rejected.sum() - self.q_rejected.sum()

    @property
    def mean_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over their lengths."""
        (chosen, rejected) = self.ratios
        return chosen / len(self.p_chosen), rejected / len(self.p_rejected)


Paper = Callable[[list[One]], torch.Tensor]


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def mean(terms: list[torch.Tensor]) -> torch.Tensor:
    return sum(terms, torch.zeros((), dtype=torch.float64)) / len(terms)


def likelihood(pairs: list[One]) -> torch.Tensor:
    """-log p of the chosen answers a token. The papers divide each answer by its length; TRL, and ORPO's, CPO's and
    MPO's own code, the batch by its tokens. `test_a_pair_alone_has_the_papers_likelihood` has the former."""
    return -torch.cat([one.p_chosen for one in pairs]).mean()


def dpo(pairs: list[One], beta: float = 0.1) -> torch.Tensor:
    """https://arxiv.org/abs/2305.18290, eq. 7."""
    return mean([-log_sigmoid(beta * (one.ratios[0] - one.ratios[1])) for one in pairs])


def hinge(pairs: list[One], beta: float = 0.1) -> torch.Tensor:
    """SLiC, https://arxiv.org/abs/2305.10425, eq. 1, with RSO's normalised likelihoods, 2309.06657, section 3.2."""
    return mean([torch.clamp(1 - beta * (one.ratios[0] - one.ratios[1]), min=0) for one in pairs])


def ipo(pairs: list[One], tau: float = 0.1) -> torch.Tensor:
    """https://arxiv.org/abs/2310.12036, eq. 17, over log ratios a token, as its authors ran it (TRL says)."""
    return mean([(one.mean_ratios[0] - one.mean_ratios[1] - 1 / (2 * tau)) ** 2 for one in pairs])


def conservative(pairs: list[One], epsilon: float, beta: float = 0.1) -> torch.Tensor:
    """https://ericmitchell.ai/cdpo.pdf: (1 - e) L(chosen, rejected) + e L(rejected, chosen)."""
    swapped = [One(one.p_rejected, one.p_chosen, one.q_rejected, one.q_chosen) for one in pairs]
    return (1 - epsilon) * dpo(pairs, beta) + epsilon * dpo(swapped, beta)


def robust(pairs: list[One], epsilon: float, beta: float = 0.1) -> torch.Tensor:
    """https://arxiv.org/abs/2403.00409: ((1 - e) L(chosen, rejected) - e L(rejected, chosen)) / (1 - 2 e)."""
    swapped = [One(one.p_rejected, one.p_chosen, one.q_rejected, one.q_chosen) for one in pairs]
    return ((1 - epsilon) * dpo(pairs, beta) - epsilon * dpo(swapped, beta)) / (1 - 2 * epsilon)


def length_normalised(pairs: list[One], beta: float) -> torch.Tensor:
    """Tülu 3, https://arxiv.org/abs/2411.15124, section 5: DPO with each log ratio over its answer's length."""
    return mean([-log_sigmoid(beta * (one.mean_ratios[0] - one.mean_ratios[1])) for one in pairs])


def simpo(pairs: list[One], beta: float, gamma: float, epsilon: float = 0.0) -> torch.Tensor:
    """https://arxiv.org/abs/2405.14734, eq. 6; of judgements that err with epsilon, as conservative DPO has it."""
    xs = [beta * one.p_chosen.mean() - beta * one.p_rejected.mean() - gamma for one in pairs]
    return mean([-(1 - epsilon) * log_sigmoid(x) - epsilon * log_sigmoid(-x) for x in xs])


def orpo(pairs: list[One], weight: float) -> torch.Tensor:
    """https://arxiv.org/abs/2403.07691, eq. 3, 6 and 7: P(y|x) is the mean over tokens, exponentiated."""

    def log_odds(logps: torch.Tensor) -> torch.Tensor:
        p = torch.exp(logps.mean())
        return torch.log(p / (1 - p))

    odds = mean([-log_sigmoid(log_odds(one.p_chosen) - log_odds(one.p_rejected)) for one in pairs])
    return likelihood(pairs) + weight * odds


def cpo(pairs: list[One], beta: float, epsilon: float = 0.0, weight: float = 1.0) -> torch.Tensor:
    """https://arxiv.org/abs/2401.08417, section 3: L_prefer, DPO's with a uniform reference, plus L_NLL."""
    xs = [beta * (one.p_chosen.sum() - one.p_rejected.sum()) for one in pairs]
    preferred = mean([-(1 - epsilon) * log_sigmoid(x) - epsilon * log_sigmoid(-x) for x in xs])
    return preferred + weight * likelihood(pairs)


def mpo(pairs: list[One], weights: tuple[float, float, float] = (0.8, 0.2, 1.0), beta: float = 0.1) -> torch.Tensor:
    """https://arxiv.org/abs/2411.10442, section 3.2: w_p L_p + w_q L_q + w_g L_g; of the shift in L_q this is the first
    batch, so the mean of its own rewards."""
    rewards = [tuple(beta * ratio for ratio in one.ratios) for one in pairs]
    shift = mean([(chosen + rejected) / 2 for chosen, rejected in rewards]).detach()
    quality = mean([-log_sigmoid(chosen - shift) - log_sigmoid(-(rejected - shift)) for chosen, rejected in rewards])
    return weights[0] * dpo(pairs, beta) + weights[1] * quality + weights[2] * likelihood(pairs)


CASES: dict[str, tuple[PreferenceMethod, dict[str, Any], Paper]] = {
    "dpo": ("dpo", {}, dpo),
    "dpo beta": ("dpo", {"beta": 0.5}, lambda pairs: dpo(pairs, 0.5)),
    "hinge": ("dpo", {"loss_type": "hinge"}, hinge),
    "hinge beta": ("dpo", {"loss_type": "hinge", "beta": 0.5}, lambda pairs: hinge(pairs, 0.5)),
    "ipo": ("dpo", {"loss_type": "ipo"}, ipo),
    "ipo beta": ("dpo", {"loss_type": "ipo", "beta": 0.5}, lambda pairs: ipo(pairs, 0.5)),
    "robust": ("dpo", {"loss_type": "robust"}, lambda pairs: robust(pairs, 0.1)),
    "robust and rpo": (
        "dpo",
        {"loss_type": "robust", "label_smoothing": 0.3, "nll_weight": 0.7, "beta": 0.3},
        lambda pairs: robust(pairs, 0.3, 0.3) + 0.7 * likelihood(pairs),
    ),
    "label smoothing": ("dpo", {"label_smoothing": 0.2}, lambda pairs: conservative(pairs, 0.2)),
    "rpo": ("dpo", {"nll_weight": 0.7}, lambda pairs: dpo(pairs) + 0.7 * likelihood(pairs)),
    "smoothing and rpo": (
        "dpo",
        {"label_smoothing": 0.2, "nll_weight": 0.7, "beta": 0.3},
        lambda pairs: conservative(pairs, 0.2, 0.3) + 0.7 * likelihood(pairs),
    ),
    "length-normalised": ("dpo", {"loss_type": "sigmoid_norm"}, lambda pairs: length_normalised(pairs, 5.0)),
    "length-normalised beta": (
        "dpo",
        {"loss_type": "sigmoid_norm", "beta": 2.0},
        lambda pairs: length_normalised(pairs, 2.0),
    ),
    "simpo": ("simpo", {}, lambda pairs: simpo(pairs, 2.0, 1.0)),
    "simpo smoothing": (
        "simpo",
        {"beta": 2.5, "gamma": 0.5, "label_smoothing": 0.2},
        lambda pairs: simpo(pairs, 2.5, 0.5, 0.2),
    ),
    "cpo-simpo": ("simpo", {"gamma": 0.4, "nll_weight": 0.5}, lambda p: simpo(p, 2.0, 0.4) + 0.5 * likelihood(p)),
    "orpo": ("orpo", {}, lambda pairs: orpo(pairs, 0.1)),
    "orpo beta": ("orpo", {"beta": 1.5}, lambda pairs: orpo(pairs, 1.5)),
    "cpo": ("cpo", {}, lambda pairs: cpo(pairs, 0.1)),
    "cpo smoothing": (
        "cpo",
        {"beta": 0.3, "label_smoothing": 0.2, "nll_weight": 0.5},
        lambda pairs: cpo(pairs, 0.3, 0.2, 0.5),
    ),
    "mpo": ("mpo", {}, mpo),
    "mpo weights": (
        "mpo",
        {"preference_weight": 0.0, "quality_weight": 2.0, "generation_weight": 0.0, "beta": 0.3},
        lambda pairs: mpo(pairs, (0.0, 2.0, 0.0), 0.3),
    ),
}
REFERENCE_FREE = ("simpo", "orpo", "cpo")


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_family(tmp_path_factory.mktemp("qwen") / "vlm", "qwen2_5_vl")


def known(policy: Moved, count: int) -> list[One]:
    """What the papers' formulas are over."""
    found = []
    for row, pair in enumerate(cast("Sequence[TextPair]", policy.judgements)[:count]):
        chosen, rejected = pair.chosen, pair.rejected
        own = [policy.logps(row, text) for text in (chosen, rejected)]
        found.append(One(*own, *(policy.logps(row, text, reference=True) for text in (chosen, rejected))))
    return found


def require_the_same(policy: Moved, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """In value and in gradient."""
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    ours, papers = policy.gradients(loss), policy.gradients(expected)
    assert ours.keys() == papers.keys()
    assert all(".lora_" in name for name in ours)
    length = math.sqrt(sum(float(one.square().sum()) for one in papers.values()))
    away = math.sqrt(sum(float((ours[name] - papers[name]).square().sum()) for name in papers))
    assert length > 1e-4
    assert away < 1e-3 * length


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_the_papers(tiny_vlm: Path, tmp_path: Path, name: str) -> None:
    """Two pairs with a picture, two without, answers of different lengths."""
    method, more, paper = CASES[name]
    policy = moved(tiny_vlm, text_pairs(tiny_vlm, COUNT), settings(method, COUNT, **more), tmp_path)
    require_the_same(policy, policy.loss(range(COUNT)), paper(known(policy, COUNT)))


@pytest.mark.parametrize("name", ["dpo", "label smoothing", "simpo", "orpo", "cpo", "mpo"])
def test_on_qwen_the_loss_and_its_gradient_are_the_papers(tiny_qwen: Path, tmp_path: Path, name: str) -> None:
    """Pictures of any size in one row of patches, and three-dimensional positions."""
    method, more, paper = CASES[name]
    policy = moved(tiny_qwen, text_pairs(tiny_qwen, COUNT), settings(method, COUNT, **more), tmp_path)
    require_the_same(policy, policy.loss(range(COUNT)), paper(known(policy, COUNT)))


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_pair_alone_has_the_papers_likelihood(tiny_vlm: Path, tmp_path: Path, weight: float) -> None:
    """RPO, https://arxiv.org/abs/2404.19733, eq. 1, over its alpha: DPO, and likelihood over the answer's length."""
    policy = moved(tiny_vlm, text_pairs(tiny_vlm, COUNT), settings("dpo", 1, nll_weight=weight), tmp_path)
    pair = known(policy, COUNT)[3:]
    expected = dpo(pair) - weight * pair[0].p_chosen.sum() / len(pair[0].p_chosen)
    require_the_same(policy, policy.loss([3]), expected)


def test_the_reward_shift_is_the_mean_over_batches(tiny_vlm: Path, tmp_path: Path) -> None:
    """MPO's quality loss of a second batch is shifted by the mean of both batches' mean rewards."""
    asked = settings("mpo", 2, preference_weight=0.0, quality_weight=1.0, generation_weight=0.0)
    policy = moved(tiny_vlm, text_pairs(tiny_vlm, COUNT), asked, tmp_path)
    policy.loss([0, 1])
    loss = policy.loss([2, 3])
    rewards = [tuple(0.1 * ratio for ratio in one.ratios) for one in known(policy, COUNT)]
    means = [float(sum(rewards[a] + rewards[b]).detach()) / 4 for a, b in ((0, 1), (2, 3))]
    shift = sum(means) / 2
    assert means[0] != pytest.approx(means[1], abs=1e-4)
    terms = [-log_sigmoid(chosen - shift) - log_sigmoid(-(rejected - shift)) for chosen, rejected in rewards[2:]]
    require_the_same(policy, loss, mean(terms))


@pytest.mark.parametrize("method", REFERENCE_FREE)
def test_a_method_without_a_reference_computes_none(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: PreferenceMethod
) -> None:
    """Neither a forward for it, nor weights: what stands where TRL wants a model has no parameters."""
    policy = moved(tiny_vlm, text_pairs(tiny_vlm, 2), settings(method, 2), tmp_path)
    forwards: list[bool] = []
    policy.trainer.model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(PairTrainer, "compute_ref_log_probs", refuse)
    monkeypatch.setattr(type(policy.applied), "reference", refuse)
    policy.trainer.keep_reference(lambda: None)
    policy.loss([0, 1])
    assert forwards == [True]
    assert list(policy.trainer.ref_model.parameters()) == []


def test_rewards_are_the_methods_own(tiny_vlm: Path, tmp_path: Path) -> None:
    """Means over an answer's tokens where the method divides by length; TRL reports sums."""
    for method, more, beta in (("simpo", {}, 2.0), ("dpo", {"loss_type": "sigmoid_norm"}, 5.0)):
        policy = moved(tiny_vlm, text_pairs(tiny_vlm, COUNT), settings(method, COUNT, **more), tmp_path)  # type: ignore[arg-type]
        policy.loss(range(COUNT))
        pairs = known(policy, COUNT)
        rewards = [
            (beta * one.p_chosen.mean(), beta * one.p_rejected.mean())
            if method == "simpo"
            else (beta * one.mean_ratios[0], beta * one.mean_ratios[1])
            for one in pairs
        ]
        told = {name: values[-1] for name, values in policy.trainer._metrics["train"].items()}
        assert told["rewards/chosen"] == pytest.approx(float(mean([one for one, _ in rewards]).detach()), abs=1e-4)
        assert told["rewards/rejected"] == pytest.approx(float(mean([one for _, one in rewards]).detach()), abs=1e-4)
        right = sum(bool(chosen > rejected) for chosen, rejected in rewards) / COUNT
        assert told["rewards/accuracies"] == right


def kto(policy: Moved, weights: tuple[float, float], beta: float = 0.1) -> tuple[torch.Tensor, float]:
    """The paper's loss of the judgements in their order, and its KL."""

    def ratio(row: int, answer: str) -> torch.Tensor:
        return policy.logps(row, answer).sum() - policy.logps(row, answer, reference=True).sum()

    return kto_paper(ratio, cast("Sequence[TextThumb]", policy.judgements), range(COUNT), weights, beta)


@pytest.mark.parametrize("seed", range(4))
def test_ktos_loss_and_its_gradient_are_the_papers(tiny_vlm: Path, tmp_path: Path, seed: int) -> None:
    asked = settings("kto", COUNT, desirable_weight=1.5, undesirable_weight=0.7, beta=0.3)
    policy = moved(tiny_vlm, text_thumbs(tiny_vlm, COUNT), asked, tmp_path, seed=seed)
    expected, _ = kto(policy, (1.5, 0.7), beta=0.3)
    require_the_same(policy, policy.loss(range(COUNT)), expected)


def test_ktos_reference_point_is_met_on_both_sides_of_its_clip(tiny_vlm: Path, tmp_path: Path) -> None:
    """So that the four above say something of either."""
    judged = text_thumbs(tiny_vlm, COUNT)
    found = []
    for seed in range(4):
        policy = moved(tiny_vlm, judged, settings("kto", COUNT), tmp_path, seed=seed)
        _, estimate = kto(policy, (1.0, 1.0))
        policy.loss(range(COUNT))
        told = policy.trainer._metrics["train"]["kl"][-1]
        assert told == pytest.approx(max(0.0, estimate), abs=1e-4)
        found.append(estimate)
    assert min(found) < 0 < max(found)


def test_on_qwen_ktos_loss_and_its_gradient_are_the_papers(tiny_qwen: Path, tmp_path: Path) -> None:
    policy = moved(tiny_qwen, text_thumbs(tiny_qwen, COUNT), settings("kto", COUNT), tmp_path)
    expected, _ = kto(policy, (1.0, 1.0))
    require_the_same(policy, policy.loss(range(COUNT)), expected)
