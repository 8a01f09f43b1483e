"""Learns a head from pairs, and says how often it is right on pairs that it has not seen.

Comes in: pairs to learn from, pairs held out, a reader of features. Goes out: a `Head` with its figures, or
TrainingError when it is not right often enough. Must not import `serve`.

Shapes: N pairs, D features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from noria.errors import TrainingError
from noria.evals.scores import rate_of
from noria.records import Json, Pair
from noria.rewards import PreferencesOptions
from train.data.snapshot import is_held_out
from train.rewards.preferences.features import Answered, FeatureReader
from train.rewards.preferences.fit import choose_penalty, fit, logistic_loss
from train.rewards.preferences.head import Head
from train.rewards.protocol import Failure

PROBE = Answered([{"role": "user", "content": "Hello."}], "Good day.")  # by its features a model is known again
_LEAST_SCALE = 1e-6  # of the features' largest: one that hardly moves says nothing


@dataclass(frozen=True)
class _Features:
    """Both sides of N pairs; `prompts` are their hashes; `left_out` counts by reason."""

    chosen_ND: torch.Tensor
    rejected_ND: torch.Tensor
    prompts: list[str]
    left_out: dict[str, int]


def learn_head(
    train: Sequence[Pair], held_out: Sequence[Pair], reader: FeatureReader, options: PreferencesOptions
) -> Head:
    """The head, its figures stated. Without held-out pairs, a share of the prompts is held out here.

    Raises TrainingError: too few pairs (`no_pairs`), or accuracy below `min_accuracy` (`reward_inaccurate`).
    """
    if not held_out:
        train, held_out = split(train, options.held_out)
    _require_pairs(len(train), len(held_out), options)
    probe_D = reader.read([PROBE])[0]
    if isinstance(probe_D, Failure):
        raise TrainingError(f"the model's features cannot be read: {probe_D.reason}", code="no_features")
    learnt, unseen = _read(reader, train), _read(reader, held_out)
    _require_pairs(len(learnt.prompts), len(unseen.prompts), options, learnt.left_out, unseen.left_out)
    head = _fitted(learnt, probe_D, options)
    held = _accuracy(head, unseen) | {"left_out": unseen.left_out}
    head = replace(head, figures={**head.figures, "state": reader.state, "held_out": held})
    require_accuracy(head, options)
    return head


def split(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn from and pairs held out, by the prompt's hash: a prompt is always on the same side."""
    held_out = [pair for pair in pairs if is_held_out(pair.prompt_hash, share)]
    return [pair for pair in pairs if not is_held_out(pair.prompt_hash, share)], held_out


def require_accuracy(head: Head, options: PreferencesOptions) -> None:
    """Raises TrainingError unless the head's held-out accuracy reaches the bound, over enough pairs."""
    told = head.figures.get("held_out", {})
    _require_pairs(1, int(told.get("n", 0)), options)
    if told["score"] < options.min_accuracy:
        raise TrainingError(
            f"the preference head orders {told['score']:.1%} of {told['n']} held-out pairs rightly (95 % interval "
            f"{told['low']:.1%} to {told['high']:.1%}); min_accuracy={options.min_accuracy:g} is asked for. More "
            "preferences help; a reward that is right so rarely would be learnt by heart",
            param="min_accuracy",
            code="reward_inaccurate",
        )


def _fitted(learnt: _Features, probe_D: torch.Tensor, options: PreferencesOptions) -> Head:
    both_ND = torch.cat([learnt.chosen_ND, learnt.rejected_ND])
    mean_D, spread_D = both_ND.mean(0), both_ND.std(0, correction=0)
    dim = both_ND.shape[1]
    # sqrt(D): one penalty then means the same for every hidden size
    scale_D = torch.clamp(spread_D, min=_LEAST_SCALE * float(spread_D.max().clamp(min=1e-12))) * math.sqrt(dim)
    differences_ND = (learnt.chosen_ND - learnt.rejected_ND) / scale_D
    l2, losses = (options.l2, {}) if options.l2 else choose_penalty(differences_ND, learnt.prompts)
    weight_D = fit(differences_ND, l2)
    nats_N = (both_ND - mean_D) / scale_D @ weight_D
    spread = float(nats_N.std(correction=0)) or 1.0
    head = Head(weight_D, mean_D, scale_D, float(nats_N.mean()), spread, probe_D)
    figures: Json = {
        "dim": dim,
        "spread_nats": spread,
        "l2": l2,
        "l2_losses": losses,
        "loss": float(logistic_loss(differences_ND, weight_D)),
        "train": _accuracy(head, learnt) | {"left_out": learnt.left_out, "prompts": len(set(learnt.prompts))},
    }
    return replace(head, figures=figures)


def _accuracy(head: Head, pairs: _Features) -> Json:
    """The share of pairs in the right order, with its 95 % Wilson interval; equal scores are half right."""
    gaps_N = head.scores(pairs.chosen_ND) - head.scores(pairs.rejected_ND)
    return rate_of(((torch.sign(gaps_N) + 1) / 2).tolist())


def _read(reader: FeatureReader, pairs: Sequence[Pair]) -> _Features:
    states = reader.read([side for pair in pairs for side in Answered.sides(pair)])
    chosen: list[torch.Tensor] = []
    rejected: list[torch.Tensor] = []
    prompts: list[str] = []
    left_out: Counter[str] = Counter()
    for at, pair in enumerate(pairs):
        better, worse = states[2 * at : 2 * at + 2]
        for side in (better, worse):
            if isinstance(side, Failure):
                left_out[side.reason] += 1
                break
        else:
            chosen.append(better)
            rejected.append(worse)
            prompts.append(pair.prompt_hash)
    empty = torch.zeros(0, 1, dtype=torch.float64)
    sides = (torch.stack(chosen), torch.stack(rejected)) if prompts else (empty, empty)
    return _Features(*sides, prompts, dict(left_out))


def _require_pairs(
    learnt: int,
    held_out: int,
    options: PreferencesOptions,
    *left_out: dict[str, int],
) -> None:
    if learnt and held_out >= options.min_held_out:
        return
    rest = sum((Counter(one) for one in left_out), Counter())
    why = "".join(f", {count} {reason}" for reason, count in rest.items())
    raise TrainingError(
        f"too few preferences for a reward: {learnt} pairs to learn from and {held_out} held out{why}; at least "
        f"{options.min_held_out} held out are asked for (min_held_out)",
        param="min_held_out",
        code="no_pairs",
    )
