"""What every preference trainer has around TRL's loss: module policies, a reference that is kept, checkpoints of what
trains, no step on a NaN.

Comes in: judgements as text, a model whose policies are applied. Goes out: a base class to be named before TRL's own.
Must not import `serve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from noria.errors import TrainingError
from train.data.pairs import TextPair, TextThumb
from train.methods.checkpoints import CheckpointedTrainer, step_of
from train.methods.policies import Applied

ROWS = "rows_of_batch"  # which judgements are in a batch: indices into the training list, taken out before the model
REFERENCE = "reference.safetensors"  # in a checkpoint: what the reference says of each row so far


class ElsewhereReference(torch.nn.Module):
    """Stands where TRL wants a reference model: the policy is its own, or there is none; see GuardedTrainer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called."""
        raise TrainingError("the reference's log-probabilities should have been kept")


_MASKS = ("attention_mask", "KL_attention_mask")  # of a batch's tokens


class Heard:
    """A model that remembers what it last said. `outputs` is TRL's, with log-probabilities and without logits."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        self.outputs = self._model(*args, **kwargs)
        return self.outputs


class GuardedTrainer(CheckpointedTrainer, ABC):
    """A TRL trainer over applied policies, that keeps what the reference says and refuses a bad loss.

    The reference is the policy before its first step and never changes, so one forward a row is enough. TRL can read
    kept values from the batch, but refuses to precompute them for pictures. With LoRA alone they are filled in at a
    row's first visit, the adapter off, from the very batch the policy runs on, so policy and reference agree exactly
    before the first step. Where weights train in full, `keep_reference` has to run before the first step. A checkpoint
    holds them, too: computed again in another batch they would differ in their last bits.
    A method without a reference computes and keeps none of this.
    """

    passes = 1.0  # over the judgements, in what transformers takes for one
    has_reference = True

    def __init__(
        self, *args: Any, applied: Applied, judgements: Sequence[TextPair] | Sequence[TextThumb], **kwargs: Any
    ) -> None:
        reference = ElsewhereReference(applied.model.config)
        super().__init__(*args, model=applied.model, ref_model=reference, **kwargs)
        self.precompute_ref_logps = True  # "read them from the batch"; set after TRL's refusal has been passed
        applied.set_dropout()  # TRL turned every dropout off, the adapters' too
        self._applied = applied
        self._judgements = judgements
        self.step_rows: list[int] = []
        self.step_tokens = 0

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser that the arguments ask for, over the policies' own groups."""
        self.optimizer: Any  # transformers does not say
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
            self.optimizer = self._applied.optimizer(make, **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss; nobody asks for outputs, since nothing is evaluated here.

        Raises TrainingError, naming the batch's judgements, when it is not finite.
        """
        rows = [int(row) for row in inputs.pop(ROWS)]
        self.step_rows.extend(rows)
        self.step_tokens += sum(int(inputs[name].sum()) for name in _MASKS if name in inputs)
        self._add_reference(model, inputs, rows)
        heard = Heard(model)
        loss = self._whole(super().compute_loss(heard, inputs), heard.outputs, inputs)
        if not torch.isfinite(loss).all():
            raise non_finite(f"loss {float(loss.detach())}", [self._judgements[row].id for row in rows])
        return loss

    def keep_reference(self, check: Callable[[], None]) -> None:
        """Runs everything once through the untrained policy. `check` is called between batches and may raise."""
        if not self.has_reference:
            return
        for rows in self._batches():
            check()
            inputs = self._prepare_inputs(self.data_collator([{"row": row} for row in rows]))
            inputs.pop(ROWS)
            self._add_reference(self.model, inputs, rows)

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
        """A new optimiser step: its judgements are named afresh, its tokens counted from none."""
        self.step_rows.clear()
        self.step_tokens = 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL would write one beside every checkpoint."""

    def step_judgements(self) -> list[str]:
        """The judgements that took part in the step now under way."""
        return [self._judgements[row].id for row in self.step_rows]

    @abstractmethod
    def learnt_from(self) -> dict[str, int]:
        """Counts of what it reads, for the report."""

    @abstractmethod
    def _add_reference(self, model: Any, inputs: dict[str, Any], rows: list[int]) -> None:
        """Puts what the reference says of these rows into the batch, as TRL reads it."""

    @abstractmethod
    def _whole(self, loss: Any, outputs: Any, inputs: dict[str, Any]) -> Any:
        """The loss and figures of a micro-batch, after TRL's part of both."""

    @abstractmethod
    def _batches(self) -> list[list[int]]:
        """Rows of every batch that `keep_reference` has to run."""

    @abstractmethod
    def _kept(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the reference, and of other state, beside what trains."""

    @abstractmethod
    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Takes back what `_kept` gave."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.has_reference:
            save_file(self._kept(), Path(output_dir or self.args.output_dir) / REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.has_reference:
            self._restore(load_file(Path(resume_from_checkpoint) / REFERENCE, device=str(self.args.device)))


def non_finite(what: str, judgements: Sequence[str]) -> TrainingError:
    """The error of a step that was not taken."""
    return TrainingError(
        f"{what} is not finite; stopped before the optimiser step. Judgements in the batch: {', '.join(judgements)}",
        code="non_finite",
    )
