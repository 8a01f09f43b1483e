"""Direct preference optimisation of the language model's LoRA (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

Comes in: a master checkpoint, the lineage's adapters and rendered pairs. Goes out: a new adapter folder and a report.
Per pair, eq. 7: `-log sigmoid(beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))))`,
with sums over the answer's tokens. The policy starts as the reference, so the first step's loss is ln 2.
Must not import `serve`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import DPOConfig

from noria.errors import TrainingError
from noria.settings import DpoSettings, TrainSettings
from train.data.pairs import LoadImage, TextPair
from train.methods import frozen
from train.methods.dpo_trainer import GuardedDPOTrainer, PairCollator, Step, StepWatch
from train.methods.policy_model import (
    load_policy,
    load_processor,
    lora_config,
    read_architecture,
    save_adapter,
    training_dtype,
)


@dataclass(frozen=True)
class DpoReport:
    """What a training did. `loss_last` and the other `*_last` are means over the last tenth of the steps.

    `frozen` are hashes of the tower's and the aligner's tensors in memory, the same before and after.
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
    frozen: dict[str, str]


def train_dpo(
    master: Path,
    adapters: Sequence[Path],
    pairs: Sequence[TextPair],
    load_image: LoadImage,
    out: Path,
    settings: TrainSettings,
    *,
    on_step: Callable[[Step], None],
    check: Callable[[], None],
    dtype: torch.dtype | None = None,
) -> DpoReport:
    """Trains and writes the adapter to `out`, which appears by rename, complete or not at all.

    `check` is called between micro-batches and may raise to stop. Raises TrainingError: non-finite loss or gradient,
    a frozen module that changed, no targets. `dtype` is that of the base weights; the adapter is float32.
    """
    started = time.monotonic()
    architecture = read_architecture(master)
    transformers.set_seed(settings.dpo.seed)
    dtype = dtype or training_dtype()
    model = load_policy(master, adapters, architecture, dtype)
    lora = lora_config(model, architecture, settings.lora)
    targets = sorted(lora.target_modules)
    before = frozen.tensor_hashes(model, architecture)
    guards = frozen.freeze(model, architecture)
    steps: list[Step] = []

    def record(step: Step) -> None:
        steps.append(step)
        on_step(step)

    with tempfile.TemporaryDirectory(prefix=".trl-", dir=out.parent) as scratch:
        watch = StepWatch(record, check)
        trainer = GuardedDPOTrainer(
            pairs=pairs,
            model=model,
            args=dpo_config(settings.dpo, Path(scratch)),
            train_dataset=Dataset.from_dict(
                {"row": list(range(len(pairs))), "images": [list(p.images) for p in pairs]}
            ),
            data_collator=PairCollator(pairs, load_processor(master), load_image),
            processing_class=load_processor(master),
            peft_config=lora,
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.remove_callback(transformers.PrinterCallback)
        _keep_lora_dropout(trainer.model, settings.lora.dropout)
        trainable = _require_only_lora(trainer)
        trainer.train()
    if any(pair.images for pair in pairs) and not any(guard.calls for guard in guards):
        raise TrainingError("pictures were trained on but the vision tower never ran", code="not_frozen")
    after = frozen.tensor_hashes(trainer.model.get_base_model(), architecture)
    frozen.require_equal(before, after, "during training")
    _write(trainer.model, out, targets)
    return _report(steps, pairs, trainable, dtype, time.monotonic() - started, after)


def dpo_config(dpo: DpoSettings, scratch: Path) -> DPOConfig:
    """The settings in TRL's words. Nothing is saved, sent or printed by TRL; lengths were checked by the snapshot."""
    cuda = torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(scratch),
        beta=dpo.beta,
        learning_rate=dpo.learning_rate,
        num_train_epochs=dpo.epochs,
        per_device_train_batch_size=dpo.micro_batch_size,
        gradient_accumulation_steps=dpo.batch_size // dpo.micro_batch_size,
        warmup_steps=dpo.warmup_ratio if dpo.warmup_ratio < 1 else 0.999,
        max_grad_norm=dpo.max_grad_norm,
        max_length=None,
        seed=dpo.seed,
        data_seed=dpo.seed,
        use_cpu=not cuda,
        bf16=False,
        gradient_checkpointing=cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


def _keep_lora_dropout(model: Any, dropout: float) -> None:
    """TRL turns every dropout off, the adapter's too; the setting asks for this one."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name and isinstance(module, torch.nn.Dropout):
            module.p = dropout


def _require_only_lora(trainer: GuardedDPOTrainer) -> int:
    """How many numbers train. Raises TrainingError unless the optimiser holds the LoRA tensors and nothing else."""
    lora = {id(p) for name, p in trainer.model.named_parameters() if ".lora_" in name}
    others = [name for name, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in lora]
    optimizer = trainer.create_optimizer()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if others or held != lora:
        raise TrainingError(f"more than the adapter would train: {', '.join(others[:5])}", code="not_frozen")
    return sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def _write(model: Any, out: Path, targets: Sequence[str]) -> None:
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(model, beside, targets)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def _report(
    steps: Sequence[Step],
    pairs: Sequence[TextPair],
    trainable: int,
    dtype: torch.dtype,
    seconds: float,
    hashes: dict[str, str],
) -> DpoReport:
    last = steps[-max(1, math.ceil(len(steps) / 10)) :]
    return DpoReport(
        steps=len(steps),
        pairs=len(pairs),
        loss_first=steps[0].loss,
        loss_last=sum(step.loss for step in last) / len(last),
        margin_last=sum(step.margin for step in last) / len(last),
        accuracy_last=sum(step.accuracy for step in last) / len(last),
        trainable_parameters=trainable,
        dtype=str(dtype).removeprefix("torch."),
        seconds=round(seconds, 3),
        frozen=hashes,
    )
