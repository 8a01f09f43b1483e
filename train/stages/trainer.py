"""transformers' Trainer with the stage's own order, loss and optimiser groups, and no step on a NaN.

Comes in: a `Task`, a `Plan`, the recipe's stage. Goes out: a trained model in memory, one `Step` a step, checkpoints
(`train.methods.checkpoints`). Must not import `serve`.

The loss of a step is the sum of its terms over all micro-batches and processes, divided by their number: it does not
depend on how a batch is cut up.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch.utils.data import DataLoader

from noria.errors import TrainingError
from noria.methods.table import PREFERENCE_KINDS
from noria.recipes import RecipeStage
from train.methods.checkpoints import CheckpointedTrainer, StopWatch, saving
from train.stages.order import Plan, Unit
from train.stages.spec import Step

_SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "constant-linear": "warmup_stable_decay",
}


class Task(Protocol):
    """What a kind of stage brings: the model that is called, its batches and its loss."""

    model: Any

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """The optimiser's parameter groups of the (wrapped) model; each has `params`, `lr`, `weight_decay`."""

    def collate(self, units: list[Unit]) -> dict[str, Any]:
        """A micro-batch: what `loss` needs, `items` (loss terms), `tokens` (read), `sources` (where rows are from)."""

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The sum of the loss over the batch's items, and figures to report."""


class StageTrainer(CheckpointedTrainer):
    """Runs one task over one plan."""

    def __init__(
        self, task: Task, plan: Plan, stage: RecipeStage, out: Path, watch: StageWatch, **options: Any
    ) -> None:
        self.task = task
        self._plan = plan
        self._sources: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self._micro_batch = stage.micro
        super().__init__(model=task.model, args=arguments(stage, plan, out, **options), callbacks=[watch])
        watch.trainer = self
        self.watch = watch
        self.model_accepts_loss_kwargs = True  # the loss is divided here, by all of a step's items
        # Walked once: most of a model's modules do not train, and a small step would spend a tenth on finding that.
        self._trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.ProgressCallback)

    def get_train_dataloader(self) -> Any:
        """This process's micro-batches, in order; a resumed run skips those it has seen."""
        mine = self._plan.share(self.args.process_index, self.args.world_size)
        units = [unit for micro in mine for unit in micro]
        rows = _Rows(len(mine), self._micro_batch)
        return DataLoader(_Units(units), batch_sampler=rows, collate_fn=self.task.collate)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the task's groups."""
        if self.optimizer is None:
            groups = self.task.groups(self.model if model is None else model)
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=not sharded)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's part of the step's loss. Raises TrainingError, naming its rows, when it is not finite."""
        self._sources += inputs["sources"]
        total, metrics = self.task.loss(model, inputs)
        if not bool(torch.isfinite(total.detach())):
            raise non_finite(f"loss {float(total.detach())}", self._sources)
        self.watch.measured(inputs["tokens"], metrics)
        return total / num_items_in_batch * self.args.world_size

    def begin_step(self) -> None:
        """A new optimiser step: its rows are named afresh."""
        self._sources.clear()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> torch.Tensor:
        items = torch.tensor(sum(batch["items"] for batch in batch_samples), dtype=torch.float32, device=device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items.clamp(min=1.0)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Raises TrainingError before the optimiser step when a gradient is not finite."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            norm = super()._clip_grad_norm(model)
            if norm is not None and not bool(torch.isfinite(torch.as_tensor(float(norm)))):
                raise non_finite(f"gradient norm {float(norm)}", self._sources)
            return norm
        trained = [(name, parameter) for name, parameter in self._trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for _, parameter in trained])
        if not bool(torch.isfinite(norm)):
            worst = next((n for n, p in trained if not bool(torch.isfinite(p.grad).all())), "all parameters")
            raise non_finite(f"gradient of {worst}", self._sources)
        torch.nn.utils.clip_grads_with_norm_([parameter for _, parameter in trained], self.args.max_grad_norm, norm)
        return norm


class StageWatch(StopWatch):
    """Reports each step, and ends the stage in order when it is told to."""

    def __init__(self, on_step: Callable[[Step], None], check: Callable[[], None]) -> None:
        super().__init__(check)
        self._on_step = on_step
        self._tokens = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._began = time.monotonic()

    def measured(self, tokens: int, metrics: dict[str, float]) -> None:
        """One micro-batch was read."""
        self._tokens += tokens
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new optimiser step."""
        super().on_step_begin(args, state, control, **kwargs)
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Every step logs once; the summary at the end has no `loss`."""
        if not logs or "loss" not in logs:
            return
        figures = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        tokens, self._tokens = self._tokens * args.world_size, 0
        self._metrics.clear()
        if not state.is_world_process_zero:
            return
        step = Step(
            step=int(state.global_step),
            steps=int(state.max_steps),
            loss=float(logs["loss"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            tokens=tokens,
            seconds=round(time.monotonic() - self._began, 4),
            metrics={name: round(value, 6) for name, value in figures.items()},
        )
        with self.stopping(control):  # who hears of a step may say stop, too
            self._on_step(step)


def arguments(stage: RecipeStage, plan: Plan, out: Path, **options: Any) -> transformers.TrainingArguments:
    """The stage in transformers' words. Nothing is sent or printed by it; every step is logged to the callback."""
    cuda = torch.cuda.is_available()
    processes = options.pop("processes", 1)
    return transformers.TrainingArguments(
        **saving(out, stage.checkpoint_every),
        max_steps=plan.steps,
        per_device_train_batch_size=stage.micro,
        gradient_accumulation_steps=plan.per_step // processes,
        **rates(stage, plan.steps),
        max_grad_norm=stage.max_grad_norm,
        seed=stage.seed,
        data_seed=stage.seed,
        use_cpu=not cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=processes > 1,  # text alone leaves the aligner without a gradient
        **options,
    )


def rates(stage: RecipeStage, steps: int) -> dict[str, Any]:
    """How the learning rates go over a stage of so many steps, in transformers' words."""
    schedule = stage.schedule or ("linear" if stage.kind in PREFERENCE_KINDS else "cosine")
    falls = {"num_decay_steps": max(1, round(stage.decay * steps)), "decay_type": "linear"}
    return {
        "lr_scheduler_type": _SCHEDULES[schedule],
        "lr_scheduler_kwargs": falls if schedule == "constant-linear" else None,
        "warmup_steps": stage.warmup_ratio if stage.warmup_ratio < 1 else 0.999,
    }


def non_finite(what: str, sources: list[str]) -> TrainingError:
    """The error of a step that was not taken."""
    return TrainingError(
        f"{what} is not finite; stopped before the optimiser step. Rows in the batch: {', '.join(sources)}",
        code="non_finite",
    )


class _Units:
    """The units of one process, by number."""

    def __init__(self, units: list[Unit]) -> None:
        self._units = units

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> Unit:
        return self._units[index]


class _Rows:
    """A batch sampler: micro-batches one after the other."""

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self.batch_size = size
        self.drop_last = False

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._count * self.batch_size, self.batch_size):
            yield list(range(start, start + self.batch_size))
