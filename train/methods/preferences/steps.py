"""What a preference training tells of each step, and what stops it between steps.

Comes in: TRL's figures of a step, a trainer. Goes out: `Step`s. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from noria.records import Json
from train.methods.checkpoints import StopWatch
from train.methods.preferences.guarded import GuardedTrainer, non_finite


@dataclass(frozen=True)
class Step:
    """One optimiser step, as measured before the step.

    Rewards are the method's own, in nats times beta: of log ratios, or of log-probabilities where there is no
    reference; sums over an answer's tokens, or means where the method divides by length. `margin` is reward_chosen -
    reward_rejected; for KTO chosen are the answers with a thumb up, and a step that lacks one of either kind has no
    margin. `accuracy` is the share of pairs whose chosen answer has the higher reward; for KTO, of answers on their
    thumb's side of the reference point. `kl` is that point, in nats, of KTO alone. `tokens` were read in the step,
    prompts and pictures included, padding not.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    margin: float | None
    accuracy: float
    reward_chosen: float | None
    reward_rejected: float | None
    grad_norm: float
    learning_rate: float  # of the first module that trains, from the language model down
    kl: float | None = None
    tokens: int = 0

    def to_json(self) -> Json:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class StepWatch(StopWatch):
    """Between TRL's steps: ends the training in order, checks gradients before the optimiser, reports each step."""

    def __init__(self, on_step: Callable[[Step], None], check: Callable[[], None], *, keeps: bool) -> None:
        super().__init__(check, keeps=keeps)
        self._on_step = on_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped and the optimiser has not run. Raises TrainingError when one is not finite."""
        trainer = self.trainer
        if not isinstance(trainer, GuardedTrainer):
            return
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise non_finite(f"gradient of {name}", trainer.step_judgements())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Every step logs once; the summary at the end has no `loss`."""
        if logs and "loss" in logs:
            guarded = self.trainer if isinstance(self.trainer, GuardedTrainer) else None
            passes, tokens = (guarded.passes, guarded.step_tokens) if guarded else (1.0, 0)
            told = {**logs, "step": state.global_step, "epoch": state.epoch}
            with self.stopping(control):
                self._on_step(read_step(told, state.max_steps, passes, tokens))


def read_step(told: dict[str, Any], steps: int, passes: float = 1.0, tokens: int = 0) -> Step:
    """A line of the trainer's history, which has one with a `loss` for every step; the rest as of GuardedTrainer."""
    chosen, rejected = (_number(told, f"rewards/{name}") for name in ("chosen", "rejected"))
    return Step(
        step=int(told["step"]),
        steps=int(steps),
        epoch=float(told["epoch"] or 0.0) * passes,
        loss=float(told["loss"]),
        margin=None if chosen is None or rejected is None else chosen - rejected,
        accuracy=float(told["rewards/accuracies"]),
        reward_chosen=chosen,
        reward_rejected=rejected,
        grad_norm=float(told.get("grad_norm", 0.0)),
        learning_rate=float(told.get("learning_rate", 0.0)),
        kl=_number(told, "kl"),
        tokens=tokens,
    )


def _number(told: dict[str, Any], key: str) -> float | None:
    return None if told.get(key) is None else float(told[key])
