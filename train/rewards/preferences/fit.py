"""The Bradley-Terry model as a logistic regression without a constant, and how its penalty is chosen.

Comes in: differences of features, chosen minus rejected. Goes out: weights. Must not import `serve`.

P(chosen beats rejected) = sigmoid(w . (f_chosen - f_rejected)) (Bradley and Terry 1952, https://doi.org/10.2307/2334029;
as a reward model: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1). Minimised is

    mean over pairs of log(1 + exp(-w . d)) + l2 / 2 * |w|^2

which is strictly convex: there is one answer, and no seed.

Shapes: N pairs, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch.nn import functional

from noria.errors import TrainingError

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FOLDS = 5
_STEPS = 1000
_GRADIENT = 1e-7  # largest entry that counts as none; features have unit scale


def fit(differences_ND: torch.Tensor, l2: float, start_D: torch.Tensor | None = None) -> torch.Tensor:
    """The weights (D,), in float64. Raises TrainingError where the minimum is not reached."""
    first_D = start_D if start_D is not None else differences_ND.new_zeros(differences_ND.shape[1])
    weight_D = first_D.clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight_D], max_iter=_STEPS, tolerance_grad=_GRADIENT, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        value = logistic_loss(differences_ND, weight_D) + 0.5 * l2 * weight_D.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
        objective()
    gradient = weight_D.grad
    if gradient is None or not float(gradient.abs().max()) <= 10 * _GRADIENT:
        raise TrainingError("the preference head's weights did not settle: are its features finite?", code="no_head")
    return weight_D.detach()


def logistic_loss(differences_ND: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    """Mean of log(1 + exp(-w . d)), in nats."""
    return functional.softplus(-(differences_ND @ weight_D)).mean()


def choose_penalty(differences_ND: torch.Tensor, prompts: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The penalty with the least loss on pairs that were left out, and every one's loss.

    Pairs of one prompt (by hash) are left out together, a fifth of the prompts at a time. With prompts of one fifth
    only, the middle penalty stands.
    """
    fold_N = torch.tensor([_fold(prompt) for prompt in prompts])
    folds = [fold for fold in range(FOLDS) if bool((fold_N == fold).any())]
    if len(folds) < 2:
        return PENALTIES[len(PENALTIES) // 2], {}
    total = dict.fromkeys(PENALTIES, 0.0)
    for fold in folds:
        inside_N, start_D = fold_N != fold, None
        for l2 in PENALTIES:
            start_D = fit(differences_ND[inside_N], l2, start_D)
            left_out_ND = differences_ND[~inside_N]
            total[l2] += float(logistic_loss(left_out_ND, start_D)) * len(left_out_ND)
    losses = {l2: value / len(prompts) for l2, value in total.items()}
    return min(PENALTIES, key=lambda l2: losses[l2]), {f"{l2:g}": value for l2, value in losses.items()}


def _fold(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"reward-fold:{prompt}".encode()).digest()[:4], "big") % FOLDS
