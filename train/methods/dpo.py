"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

Comes in: a master checkpoint, the lineage's deltas, rendered pairs, who trains. Goes out: a new delta folder, a report.
Per pair, eq. 7: `-log sigmoid(beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))))`,
with sums over the answer's tokens. The policy starts as the reference, so the first step's loss is ln 2.
Must not import `serve`.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import DPOConfig

from noria.module_settings import ResolvedPolicy
from noria.records import Module
from noria.settings import DpoSettings
from train.data.pairs import TextPair
from train.data.samples import LoadImage
from train.methods.checkpoints import last_checkpoint, saving, step_of
from train.methods.delta import save_delta
from train.methods.dpo_trainer import GuardedDPOTrainer, PairCollator, Step, StepWatch, read_step
from train.methods.policies import Applied, Row, apply_policies
from train.methods.policy_model import Base, load_policy, load_processor, read_architecture, training_dtype


@dataclass(frozen=True)
class DpoReport:
    """What a training did. `loss_last` and the other `*_last` are means over the last tenth of the steps.

    `frozen` are hashes of the frozen modules' tensors in memory, the same before and after; `modules` is the table of
    who trained.
    """

    steps: int
    pairs: int
    loss_first: float
    loss_last: float
    margin_last: float
    accuracy_last: float
    trainable_parameters: int
    dtype: str
    seconds: float
    frozen: dict[Module, str]
    modules: tuple[Row, ...]


def train_dpo(
    master: Path,
    adapters: Sequence[Path],
    pairs: Sequence[TextPair],
    load_image: LoadImage,
    out: Path,
    dpo: DpoSettings,
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
) -> DpoReport:
    """Trains and writes the delta to `out`, which appears by rename, complete or not at all.

    `check` is called between micro-batches and may raise to stop; `on_ready` gets the policies in force, before the
    first step. `base` and `serving`: see `load_policy`. `dtype` is that of the base weights; what trains is float32.
    `more` are words of TRL's DPOConfig that win over `dpo`. Where there is a folder for `checkpoints`, one is kept each
    `checkpoint_every` steps, and the training goes on from the last. Raises TrainingError: non-finite loss or gradient,
    a frozen module that changed, no targets.
    """
    started = time.monotonic()
    architecture = read_architecture(master)
    transformers.set_seed(dpo.seed)
    dtype = dtype or training_dtype()
    model = load_policy(master, adapters, architecture, dtype, base=base, serving=serving)
    applied = apply_policies(model, architecture, policies)
    on_ready(applied)
    watch = StepWatch(on_step, check, keeps=checkpoints is not None)
    kept = saving(checkpoints, checkpoint_every) if checkpoints is not None else {}
    last = last_checkpoint(checkpoints) if checkpoints is not None else None
    with tempfile.TemporaryDirectory(prefix=".trl-", dir=out.parent) as scratch:
        config = dpo_config(dpo, Path(scratch), mixed=applied.mixed, more={**(more or {}), **kept})
        trainer = _trainer(applied, config, pairs, load_processor(master), load_image, watch)
        if applied.trains_in_full and last is None:
            trainer.keep_reference(check)
        trainer.go_on(last)
    if watch.stopped is not None:
        raise watch.stopped
    steps = [read_step(line, trainer.state.max_steps) for line in trainer.state.log_history if "loss" in line]
    went_on = trainer.state.global_step > (step_of(last) if last is not None else 0)
    applied.require_frozen(pictures=went_on and any(pair.images for pair in pairs))
    save_delta(model, out, {module: policy.record() for module, policy in policies.items()})
    return _report(steps, len(pairs), applied, dtype, time.monotonic() - started)


def _trainer(
    applied: Applied,
    config: DPOConfig,
    pairs: Sequence[TextPair],
    processor: Any,
    load_image: LoadImage,
    watch: StepWatch,
) -> GuardedDPOTrainer:
    """The trainer, its optimiser made and checked."""
    trainer = GuardedDPOTrainer(
        applied=applied,
        pairs=pairs,
        args=config,
        train_dataset=Dataset.from_dict({"row": list(range(len(pairs))), "images": [list(p.images) for p in pairs]}),
        data_collator=PairCollator(pairs, processor, load_image),
        processing_class=processor,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.create_optimizer()
    return trainer


def dpo_config(
    dpo: DpoSettings, scratch: Path, *, mixed: bool = False, more: Mapping[str, Any] | None = None
) -> DPOConfig:
    """The settings in TRL's words. Nothing is sent or printed by TRL; lengths were checked by the snapshot.

    Learning rates come from the policies' parameter groups; checkpointing is theirs too.
    """
    cuda = torch.cuda.is_available()
    words: dict[str, Any] = {
        "output_dir": str(scratch),
        "beta": dpo.beta,
        "num_train_epochs": dpo.epochs,
        "per_device_train_batch_size": dpo.micro_batch_size,
        "gradient_accumulation_steps": dpo.batch_size // dpo.micro_batch_size,
        "warmup_steps": dpo.warmup_ratio if dpo.warmup_ratio < 1 else 0.999,
        "max_grad_norm": dpo.max_grad_norm,
        "max_length": None,
        "seed": dpo.seed,
        "data_seed": dpo.seed,
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
    return DPOConfig(**(words | dict(more or {})))


def _report(steps: Sequence[Step], pairs: int, applied: Applied, dtype: torch.dtype, seconds: float) -> DpoReport:
    last = steps[-max(1, math.ceil(len(steps) / 10)) :]
    return DpoReport(
        steps=len(steps),
        pairs=pairs,
        loss_first=steps[0].loss,
        loss_last=sum(step.loss for step in last) / len(last),
        margin_last=sum(step.margin for step in last) / len(last),
        accuracy_last=sum(step.accuracy for step in last) / len(last),
        trainable_parameters=applied.trainable,
        dtype=str(dtype).removeprefix("torch."),
        seconds=round(seconds, 3),
        frozen=applied.frozen_hashes,
        modules=applied.rows,
    )
