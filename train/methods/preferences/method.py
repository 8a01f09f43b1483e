"""Training by a preference method, from a model and judgements to a delta: DPO and its kin over pairs, KTO over thumbs.

Comes in: a master checkpoint, the lineage's deltas, rendered judgements, the method's settings, who trains. Goes out: a
new delta folder, a report. Which loss is whose: `objective` and `thumbs`. Must not import `serve`.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, KTOConfig

from noria.methods.preferences import KtoSettings, PreferenceSettings
from noria.module_settings import ResolvedPolicy
from noria.records import Module
from train.data.pairs import TextPair, TextThumb
from train.data.samples import LoadImage
from train.methods.checkpoints import last_checkpoint, saving, step_of
from train.methods.delta import save_delta
from train.methods.policies import Applied, Row, apply_policies
from train.methods.policy_model import Base, load_policy, load_processor, read_architecture, training_dtype
from train.methods.preferences.guarded import GuardedTrainer
from train.methods.preferences.objective import objective_of
from train.methods.preferences.order import draw_order
from train.methods.preferences.pairs import PairCollator, PairTrainer
from train.methods.preferences.steps import Step, StepWatch, read_step
from train.methods.preferences.thumbs import ThumbCollator, ThumbTrainer

Judgements = Sequence[TextPair] | Sequence[TextThumb]


@dataclass(frozen=True)
class MethodReport:
    """What a training did. `loss_last` and the other `*_last` are means over the last tenth of the steps.

    `learnt_from` counts what it read: `pairs`; or `answers`, of which `up` and `down`, and how many `alike` (`Order`).
    `frozen` are hashes of the frozen modules' tensors in memory, the same before and after; `modules` is the table of
    who trained.
    """

    steps: int
    loss_first: float
    loss_last: float
    margin_last: float | None
    accuracy_last: float
    trainable_parameters: int
    dtype: str
    seconds: float
    frozen: dict[Module, str]
    modules: tuple[Row, ...]
    learnt_from: dict[str, int] = field(default_factory=dict)


def train_method(
    master: Path,
    adapters: Sequence[Path],
    judgements: Judgements,
    load_image: LoadImage,
    out: Path,
    settings: PreferenceSettings,
    policies: Mapping[Module, ResolvedPolicy],
    *,
    on_step: Callable[[Step], None],
    check: Callable[[], None],
    on_ready: Callable[[Applied], None] = lambda applied: None,
    base: Base = "master",
    serving: Path | None = None,
    dtype: torch.dtype | None = None,
    more: Mapping[str, Any] | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int | None = None,
) -> MethodReport:
    """Trains and writes the delta to `out`, which appears by rename, complete or not at all.

    `judgements` are thumbs for KTO, pairs for every other method. `check` is called between micro-batches and may raise
    to stop; `on_ready` gets the policies in force, before the first step. `base` and `serving`: see `load_policy`.
    `dtype` is that of the base weights; what trains is float32. `more` are words of TRL's configuration that win over
    `settings`. Where there is a folder for `checkpoints`, one is kept each `checkpoint_every` steps, and the training
    goes on from the last. Raises TrainingError: non-finite loss or gradient, a frozen module that changed, no targets.
    """
    started = time.monotonic()
    architecture = read_architecture(master)
    transformers.set_seed(settings.seed)
    dtype = dtype or training_dtype()
    model = load_policy(master, adapters, architecture, dtype, base=base, serving=serving)
    applied = apply_policies(model, architecture, policies)
    on_ready(applied)
    watch = StepWatch(on_step, check, keeps=checkpoints is not None)
    kept = saving(checkpoints, checkpoint_every) if checkpoints is not None else {}
    last = last_checkpoint(checkpoints) if checkpoints is not None else None
    with tempfile.TemporaryDirectory(prefix=".trl-", dir=out.parent) as scratch:
        words = {"output_dir": scratch, **(more or {}), **kept}
        trainer = make_trainer(applied, judgements, load_processor(master), load_image, settings, words, watch)
        if applied.trains_in_full and last is None:
            trainer.keep_reference(check)
        trainer.go_on(last)
    if watch.stopped is not None:
        raise watch.stopped
    went_on = trainer.state.global_step > (step_of(last) if last is not None else 0)
    applied.require_frozen(pictures=went_on and any(one.images for one in judgements))
    save_delta(model, out, {module: policy.record() for module, policy in policies.items()})
    return _report(trainer, applied, dtype, time.monotonic() - started)


def make_trainer(
    applied: Applied,
    judgements: Judgements,
    processor: Any,
    load_image: LoadImage,
    settings: PreferenceSettings,
    words: Mapping[str, Any],
    watch: StepWatch,
) -> GuardedTrainer:
    """The method's trainer, its optimiser made and checked; `words` win over `settings`, see `train_method`."""
    trainer: GuardedTrainer
    told = {**shared_words(settings, mixed=applied.mixed), **words}
    common = {"applied": applied, "processing_class": processor, "callbacks": [watch]}
    if isinstance(settings, KtoSettings):
        thumbs = cast("Sequence[TextThumb]", judgements)
        steps = told.get("max_steps") or math.ceil(settings.epochs * len(thumbs) / settings.batch_size)
        order = draw_order(
            [one.prompt + "".join(one.images) for one in thumbs],
            steps * settings.batch_size,
            settings.micro_batch_size,
            settings.seed,
        )
        trainer = ThumbTrainer(
            judgements=thumbs,
            order=order,
            args=KTOConfig(**told | {"max_steps": steps, **kto_words(settings)}),
            train_dataset=_rows(thumbs, order.rows),
            data_collator=ThumbCollator(thumbs, processor, load_image),
            **common,
        )
    else:
        pairs, objective = cast("Sequence[TextPair]", judgements), objective_of(settings)
        trainer = PairTrainer(
            judgements=pairs,
            objective=objective,
            args=DPOConfig(**told | objective.trl_words()),
            train_dataset=_rows(pairs, range(len(pairs))),
            data_collator=PairCollator(pairs, processor, load_image),
            **common,
        )
    watch.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.create_optimizer()
    return trainer


def shared_words(settings: PreferenceSettings, *, mixed: bool = False) -> dict[str, Any]:
    """The schedule in TRL's words. Nothing is sent or printed by TRL; lengths were checked by the snapshot.

    Learning rates come from the policies' parameter groups; checkpointing is theirs too.
    """
    cuda = torch.cuda.is_available()
    return {
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "warmup_steps": settings.warmup_ratio if settings.warmup_ratio < 1 else 0.999,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": None,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not cuda,
        "bf16": mixed,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
    }


def kto_words(settings: KtoSettings) -> dict[str, Any]:
    """KTO's loss in TRL's words."""
    weights = {"desirable_weight": settings.desirable_weight, "undesirable_weight": settings.undesirable_weight}
    return {"beta": settings.beta, "loss_type": "kto", **weights}


def _rows(judgements: Judgements, rows: Sequence[int]) -> Dataset:
    """`images` is what tells TRL to leave the rows to the collator."""
    return Dataset.from_dict({"row": list(rows), "images": [list(judgements[row].images) for row in rows]})


def _report(trainer: GuardedTrainer, applied: Applied, dtype: torch.dtype, seconds: float) -> MethodReport:
    lines = [line for line in trainer.state.log_history if "loss" in line]
    steps = [read_step(line, trainer.state.max_steps, trainer.passes) for line in lines]
    last = steps[-max(1, math.ceil(len(steps) / 10)) :]
    margins = [step.margin for step in last if step.margin is not None]
    return MethodReport(
        steps=len(steps),
        loss_first=steps[0].loss,
        loss_last=sum(step.loss for step in last) / len(last),
        margin_last=sum(margins) / len(margins) if margins else None,
        accuracy_last=sum(step.accuracy for step in last) / len(last),
        trainable_parameters=applied.trainable,
        dtype=str(dtype).removeprefix("torch."),
        seconds=round(seconds, 3),
        frozen=applied.frozen_hashes,
        modules=applied.rows,
        learnt_from=trainer.learnt_from(),
    )
