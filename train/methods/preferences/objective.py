"""What each pair method's loss is made of: losses of TRL's DPOTrainer by name and weight, and a term beside them where
that has none.

Comes in: a method's settings. Goes out: an `Objective`. Must not import `serve`.

| method | TRL's DPOTrainer | beside it |
|---|---|---|
| dpo | sigmoid, hinge, ipo, robust, sigmoid_norm; sft for `nll_weight` | sigmoid with label smoothing: TRL has none |
| simpo, cpo | sft for `nll_weight` | TRL's `CPOTrainer.cpo_loss` |
| orpo | sft | TRL's `ORPOTrainer.odds_ratio_loss` |
| mpo | sigmoid, sft | the quality loss with its reward shift: TRL's `bco_pair` has none |

TRL's CPO and ORPO trainers are for text: they take no pictures, and ORPO's likelihood is over prompt and answer, image
placeholders included. So their losses are taken, and the rest is DPOTrainer's. They live in `trl.experimental`, which
may change without notice: a test holds each against its paper.

Shapes: B pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.functional import logsigmoid

from noria.methods.preferences import (
    CpoLoss,
    DpoLoss,
    MpoLoss,
    OrpoLoss,
    PreferenceLoss,
    SimpoLoss,
)


@dataclass(frozen=True)
class Answers:
    """What is known of B pairs. Log-probabilities are sums over an answer's tokens, in nats; the reference's are 0
    where the method has none. `*_tokens_B` are the answers' lengths."""

    chosen_B: torch.Tensor
    rejected_B: torch.Tensor
    reference_chosen_B: torch.Tensor
    reference_rejected_B: torch.Tensor
    chosen_tokens_B: torch.Tensor
    rejected_tokens_B: torch.Tensor

    @property
    def ratios_B(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log ratios of policy to reference, of chosen and rejected answers."""
        return self.chosen_B - self.reference_chosen_B, self.rejected_B - self.reference_rejected_B

    @property
    def mean_ratios_B(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same a token."""
        chosen_B, rejected_B = self.ratios_B
        return chosen_B / self.chosen_tokens_B.clamp(min=1), rejected_B / self.rejected_tokens_B.clamp(min=1)


Term = Callable[[Answers], torch.Tensor]
"""The loss of each pair, (B,)."""


@dataclass
class RewardShift:
    """The running mean of the rewards of every batch so far, the present one included, as InternVL's code has it."""

    mean: float = 0.0
    batches: int = 0

    def add(self, reward: float) -> float:
        """The mean after one more batch, whose rewards' mean is `reward`."""
        self.batches += 1
        self.mean += (reward - self.mean) / self.batches
        return self.mean


@dataclass(frozen=True)
class Objective:
    """One method's loss: the weighted sum of TRL's `losses`, and `term`, both averaged over a micro-batch's pairs.

    `per_token`: the method's rewards are means over an answer's tokens, not sums. `shift` is state that a checkpoint
    has to hold.
    """

    beta: float
    losses: tuple[tuple[str, float], ...] = ()
    label_smoothing: float = 0.0
    term: Term | None = None
    has_reference: bool = True
    per_token: bool = False
    shift: RewardShift | None = None

    def trl_words(self) -> dict[str, Any]:
        """TRL's part in the words of DPOConfig."""
        return {
            "beta": self.beta,
            "loss_type": [name for name, _ in self.losses],
            "loss_weights": [weight for _, weight in self.losses],
            "label_smoothing": self.label_smoothing,
        }


def objective_of(loss: PreferenceLoss) -> Objective:
    """The method's objective, its state fresh. Raises TypeError for KTO, which has no pairs."""
    if isinstance(loss, DpoLoss):
        return _dpo(loss)
    if isinstance(loss, SimpoLoss):
        simpo = partial(_simpo, beta=loss.beta, gamma=loss.gamma, smoothing=loss.label_smoothing)
        return Objective(loss.beta, _sft(loss.nll_weight), term=simpo, has_reference=False, per_token=True)
    if isinstance(loss, CpoLoss):
        cpo = partial(_smoothed, beta=loss.beta, smoothing=loss.label_smoothing)
        return Objective(loss.beta, _sft(loss.nll_weight), term=cpo, has_reference=False)
    if isinstance(loss, OrpoLoss):
        return Objective(loss.beta, _sft(1.0), term=partial(_odds, beta=loss.beta), has_reference=False, per_token=True)
    if isinstance(loss, MpoLoss):
        return _mpo(loss)
    raise TypeError(f"{type(loss).__name__} is no loss over pairs")


def _dpo(loss: DpoLoss) -> Objective:
    if loss.loss_type == "sigmoid" and loss.smoothing:
        smoothed = partial(_smoothed, beta=loss.strength, smoothing=loss.smoothing)
        return Objective(loss.strength, _sft(loss.nll_weight), term=smoothed)
    return Objective(
        loss.strength,
        ((loss.loss_type, 1.0), *_sft(loss.nll_weight)),
        label_smoothing=loss.smoothing,
        per_token=loss.loss_type in ("ipo", "sigmoid_norm"),
    )


def _mpo(loss: MpoLoss) -> Objective:
    preference = (("sigmoid", loss.preference_weight),) if loss.preference_weight else ()
    losses = (*preference, *_sft(loss.generation_weight))
    if not loss.quality_weight:
        return Objective(loss.beta, losses)
    shift = RewardShift()
    quality = partial(_quality, beta=loss.beta, weight=loss.quality_weight, shift=shift)
    return Objective(loss.beta, losses, term=quality, shift=shift)


def _sft(weight: float) -> tuple[tuple[str, float], ...]:
    """The chosen answers' negative log-likelihood, averaged over all their tokens in a micro-batch."""
    return (("sft", weight),) if weight else ()


def _smoothed(answers: Answers, *, beta: float, smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), d the difference of log ratios.

    Over log-probabilities it is CPO's preference loss (Xu et al. 2024, https://arxiv.org/abs/2401.08417, section 3),
    over ratios to a reference conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).
    """
    return _cpo_loss(*answers.ratios_B, loss_type="sigmoid", beta=beta, simpo_gamma=0.0, label_smoothing=smoothing)


def _simpo(answers: Answers, *, beta: float, gamma: float, smoothing: float) -> torch.Tensor:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma): Meng et al. 2024, eq. 6."""
    means = answers.mean_ratios_B
    return _cpo_loss(*means, loss_type="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=smoothing)


def _cpo_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, **words: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.cpo import CPOTrainer
    trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device=chosen_B.device), **words)
    losses_B, _, _ = CPOTrainer.cpo_loss(trainer, chosen_B, rejected_B)
    return cast(torch.Tensor, losses_B)


def _odds(answers: Answers, *, beta: float) -> torch.Tensor:
    """-beta log sigmoid(log (odds(chosen) / odds(rejected))), odds(y) = p / (1 - p), log p the mean over y's tokens.

    Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 7 with beta for lambda of eq. 6.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.orpo import ORPOTrainer
    chosen_B, rejected_B = answers.mean_ratios_B
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device=chosen_B.device))
    gains_B = ORPOTrainer.odds_ratio_loss(trainer, chosen_B, rejected_B)[0]
    return -cast(torch.Tensor, gains_B)


def _quality(answers: Answers, *, beta: float, weight: float, shift: RewardShift) -> torch.Tensor:
    """-log sigmoid(r(chosen) - d) - log sigmoid(-(r(rejected) - d)), r = beta log ratio, d the shift.

    MPO's quality loss (Wang et al. 2024, https://arxiv.org/abs/2411.10442), which is BCO's (Jung et al. 2024,
    https://arxiv.org/abs/2404.04656). Ours because TRL's `bco_pair` leaves the shift out.
    """
    chosen_B, rejected_B = (beta * ratio_B for ratio_B in answers.ratios_B)
    by = shift.add(float(torch.cat([chosen_B, rejected_B]).detach().mean()))
    return weight * (-logsigmoid(chosen_B - by) - logsigmoid(-(rejected_B - by)))
