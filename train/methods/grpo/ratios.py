"""How far the trainer's probabilities of the sampled tokens are from the engine's, and the correction for it.

Comes in: log-probabilities of the same tokens, one set by each. Goes out: weights for the loss, figures, a refusal.
Must not import `serve`.

With q the engine's probability of a sampled token and p the trainer's, r = p / q. A loss over samples of q becomes one
over samples of p when each token's term is weighed by r (token level), or by the product of the answer's r (sequence
level); large weights are truncated, or their terms left out: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.
TRL computes the same inside its own sampling (`vllm_importance_sampling_mode`).

Shapes: B answers, C tokens of the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from noria.errors import TrainingError
from noria.methods.grpo import GrpoSettings

_MOST = 20.0  # of |log r|: beyond it exp overflows nothing and means nothing


def weights(log_r_BC: torch.Tensor, mask_BC: torch.Tensor, grpo: GrpoSettings) -> torch.Tensor:
    """(B, C), or (B, 1) at the level of sequences: what the loss is multiplied by."""
    kind = grpo.importance_sampling
    if kind == "none":
        return torch.ones_like(log_r_BC)
    log_r = (log_r_BC * mask_BC).clamp(-_MOST, _MOST)
    if kind.startswith("sequence"):
        log_r = log_r.sum(-1, keepdim=True).clamp(-_MOST, _MOST)
    r = log_r.exp()
    low, high = _bounds(grpo)
    r = r.clamp(low, high) if kind.endswith("truncate") else r.masked_fill((r < low) | (r > high), 0.0)
    return r if kind.startswith("sequence") else r.masked_fill(mask_BC == 0, 1.0)


def _bounds(grpo: GrpoSettings) -> tuple[float, float]:
    low, high = grpo.importance_low, grpo.importance_high
    return -math.inf if low is None else low, math.inf if high is None else high


@dataclass
class Distance:
    """Adds up one batch's distance, micro-batch by micro-batch. `outside` are ratios that a bound changed."""

    tokens: int = 0
    answers: int = 0
    k3: float = 0.0
    absolute: float = 0.0
    ratio: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    outside: int = 0
    ratios: int = 0

    def add(self, log_r_BC: torch.Tensor, mask_BC: torch.Tensor, grpo: GrpoSettings) -> None:
        """One micro-batch."""
        mask = mask_BC.bool()
        log_r = log_r_BC[mask].double().clamp(-_MOST, _MOST)
        if not log_r.numel():
            return
        self.tokens += log_r.numel()
        self.k3 += float((log_r.exp() - 1 - log_r).sum())
        self.absolute += float(log_r.abs().sum())
        if grpo.importance_sampling.startswith("sequence"):
            rows = mask.any(-1)
            log_r = (log_r_BC * mask_BC).double().sum(-1)[rows].clamp(-_MOST, _MOST)
        r = log_r.exp()
        self.ratios += r.numel()
        self.ratio += float(r.sum())
        self.least, self.most = min(self.least, float(r.min())), max(self.most, float(r.max()))
        low, high = _bounds(grpo)
        self.outside += int(((r < low) | (r > high)).sum())

    def figures(self) -> dict[str, float]:
        """Means over tokens (in nats), and the ratios' mean, extremes and share outside the bounds."""
        if not self.tokens:
            return {}
        return {
            "divergence": self.k3 / self.tokens,
            "divergence_absolute": self.absolute / self.tokens,
            "ratio_mean": self.ratio / self.ratios,
            "ratio_min": self.least,
            "ratio_max": self.most,
            "ratio_outside": self.outside / self.ratios,
        }

    def require(self, grpo: GrpoSettings) -> None:
        """Raises TrainingError (code `diverged`) where the batch's mean is above the bound."""
        name = {"k3": "divergence", "absolute": "divergence_absolute"}[grpo.divergence]
        found = self.figures().get(name, 0.0)
        if not found <= grpo.max_divergence:
            raise TrainingError(
                f"engine and trainer differ by {found:.4g} nats a token ({grpo.divergence}) on {self.tokens} sampled "
                f"tokens, train.grpo.max_divergence={grpo.max_divergence:g}; stopped before the update. Is the engine "
                "on the job's parent, and how much did its quantisation lose (`noria versions`, mean_kl)?",
                code="diverged",
                param="train.grpo.max_divergence",
            )
