"""TRL's DPOTrainer with five things around its loss: module policies, mixed pictures and text, a reference kept,
checkpoints of what trains, no step on a NaN.

Comes in: TextPairs and a model whose policies are applied. Goes out: gradient steps, and one `Step` record for each.
The loss and its metrics are TRL's, untouched. Must not import `serve`.

Shapes: B pairs in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from noria.errors import TrainingError
from train.data.pairs import TextPair
from train.data.samples import LoadImage
from train.methods.checkpoints import CheckpointedTrainer, StopWatch, step_of
from train.methods.policies import Applied

ROWS = "pair_rows"  # which pairs are in a batch: indices into the training list, taken out before the model sees it
REFERENCE = "reference.safetensors"  # in a checkpoint: `rows` (N,), `chosen` and `rejected` log-probabilities (N,)


@dataclass(frozen=True)
class Step:
    """One optimiser step, as TRL measured it before the step. Rewards are beta * log ratio, in nats times beta."""

    step: int
    steps: int
    epoch: float
    loss: float
    margin: float
    accuracy: float
    reward_chosen: float
    reward_rejected: float
    grad_norm: float
    learning_rate: float  # of the first module that trains, from the language model down


class PairCollator:
    """Batches by row number.

    TRL's own vision collator does the work; it takes rendered text as it is, and a row without pictures beside rows
    that have some. (DPOTrainer hands text-only *datasets* to another collator, so one snapshot with both kinds needs
    every row on the vision path.)
    """

    def __init__(self, pairs: Sequence[TextPair], processor: Any, load_image: LoadImage) -> None:
        self._pairs = pairs
        self._load_image = load_image
        self._collate = DataCollatorForVisionPreference(processor=processor, max_length=None)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of [chosen_B, rejected_B] stacked, and ROWS (B,)."""
        rows = [int(example["row"]) for example in examples]
        texts = []
        for pair in (self._pairs[row] for row in rows):
            pictures = [self._load_image(one) for one in pair.images]
            texts.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "images": pictures})
        batch = dict(self._collate(texts))
        batch[ROWS] = torch.tensor(rows)
        return batch


class _ElsewhereReference(torch.nn.Module):
    """Stands where TRL wants a reference model: the policy is its own, see GuardedDPOTrainer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called."""
        raise TrainingError("the reference's log-probabilities should have been kept")


class GuardedDPOTrainer(CheckpointedTrainer, DPOTrainer):
    """DPOTrainer over applied policies, that keeps each pair's reference log-probabilities and refuses a bad loss.

    The reference is the policy before its first step and never changes, so one forward a pair is enough. TRL can read
    kept values from the batch, but refuses to precompute them for pictures. With LoRA alone they are filled in at a
    pair's first visit, the adapter off, from the very batch the policy runs on, so policy and reference agree exactly
    before the first step. Where weights train in full, `keep_reference` has to run before the first step. A checkpoint
    holds them, too: computed again in another batch they would differ in their last bits.
    """

    def __init__(self, *args: Any, applied: Applied, pairs: Sequence[TextPair], **kwargs: Any) -> None:
        reference = _ElsewhereReference(applied.model.config)
        super().__init__(*args, model=applied.model, ref_model=reference, **kwargs)
        self.precompute_ref_logps = True  # "read them from the batch"; set after TRL's refusal has been passed
        applied.set_dropout()  # TRL turned every dropout off, the adapters' too
        self._applied = applied
        self._pairs = pairs
        self._reference: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.step_rows: list[int] = []

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser that the arguments ask for, over the policies' own groups."""
        self.optimizer: Any  # transformers does not say
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
            self.optimizer = self._applied.optimizer(make, **options)
        return self.optimizer

    def keep_reference(self, check: Callable[[], None]) -> None:
        """Runs every pair once through the untrained policy. `check` is called between batches and may raise."""
        size = self.args.per_device_train_batch_size
        for first in range(0, len(self._pairs), size):
            check()
            rows = list(range(first, min(first + size, len(self._pairs))))
            inputs = self._prepare_inputs(self.data_collator([{"row": row} for row in rows]))
            self._add_reference(self.model, inputs, [int(row) for row in inputs.pop(ROWS)])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. Raises TrainingError, naming the batch's preferences, when it is not finite."""
        rows = [int(row) for row in inputs.pop(ROWS)]
        self.step_rows.extend(rows)
        self._add_reference(model, inputs, rows)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = loss[0] if return_outputs else loss
        if not torch.isfinite(value).all():
            raise non_finite(f"loss {float(value.detach())}", [self._pairs[row].preference_id for row in rows])
        return loss

    def go_on(self, checkpoint: Path | None) -> None:
        """Trains, from a checkpoint where there is one.

        transformers 5.17 takes a step more from the checkpoint of a last step that no pass over the data ends with.
        """
        if checkpoint is not None and step_of(checkpoint) >= self.args.max_steps > 0:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)

    def begin_step(self) -> None:
        """A new optimiser step: its pairs are named afresh."""
        self.step_rows.clear()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL would write one beside every checkpoint."""

    def step_preferences(self) -> list[str]:
        """The preferences that took part in the step now under way."""
        return [self._pairs[row].preference_id for row in self.step_rows]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        chosen_N, rejected_N = (torch.stack(one).cpu() for one in zip(*self._reference.values(), strict=True))
        kept = {"rows": torch.tensor(list(self._reference)), "chosen": chosen_N, "rejected": rejected_N}
        save_file(kept, Path(output_dir or self.args.output_dir) / REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        kept = load_file(Path(resume_from_checkpoint) / REFERENCE, device=str(self.args.device))
        for row, chosen, rejected in zip(kept["rows"], kept["chosen"], kept["rejected"], strict=True):
            self._reference[int(row)] = (chosen, rejected)

    def _add_reference(self, model: Any, inputs: dict[str, Any], rows: list[int]) -> None:
        if any(row not in self._reference for row in rows):
            with self._applied.reference():
                chosen_B, rejected_B = self.compute_ref_log_probs(model, inputs)
            for row, chosen, rejected in zip(rows, chosen_B, rejected_B, strict=True):
                self._reference.setdefault(row, (chosen, rejected))
        inputs["ref_chosen_logps"] = torch.stack([self._reference[row][0] for row in rows])
        inputs["ref_rejected_logps"] = torch.stack([self._reference[row][1] for row in rows])


class StepWatch(StopWatch):
    """Between TRL's steps: ends the training in order, checks gradients before the optimiser, reports each step."""

    def __init__(self, on_step: Callable[[Step], None], check: Callable[[], None], *, keeps: bool) -> None:
        super().__init__(check, keeps=keeps)
        self._on_step = on_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped and the optimiser has not run. Raises TrainingError when one is not finite."""
        trainer = self.trainer
        if not isinstance(trainer, GuardedDPOTrainer):
            return
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise non_finite(f"gradient of {name}", trainer.step_preferences())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Every step logs once; the summary at the end has no `loss`."""
        if logs and "loss" in logs:
            with self.stopping(control):
                self._on_step(read_step({**logs, "step": state.global_step, "epoch": state.epoch}, state.max_steps))


def read_step(told: dict[str, Any], steps: int) -> Step:
    """A line of the trainer's history, which has one with a `loss` for every step."""
    return Step(
        step=int(told["step"]),
        steps=int(steps),
        epoch=float(told["epoch"] or 0.0),
        loss=float(told["loss"]),
        margin=float(told["rewards/margins"]),
        accuracy=float(told["rewards/accuracies"]),
        reward_chosen=float(told["rewards/chosen"]),
        reward_rejected=float(told["rewards/rejected"]),
        grad_norm=float(told.get("grad_norm", 0.0)),
        learning_rate=float(told.get("learning_rate", 0.0)),
    )


def non_finite(what: str, preferences: Sequence[str]) -> TrainingError:
    """The error of a step that was not taken."""
    return TrainingError(
        f"{what} is not finite; stopped before the optimiser step. Preferences in the batch: {', '.join(preferences)}",
        code="non_finite",
    )
