"""Runs one stage, in this process or in several, and leaves its delta, its log and its report.

Comes in: a `StageRun`. Goes out: in its folder `delta/` (what was trained), `log.jsonl` (one line a step),
`report.json`; `checkpoints/` while it lasts. An attempt that was cut off goes on from its last checkpoint.
Must not import `serve`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers

from noria.blobs import Blobs
from noria.errors import TrainingError
from noria.methods.table import LABELLED_KINDS
from noria.recipes import RecipeStage
from noria.records import Json
from train.data.formats.pictures import as_data_url, into
from train.data.samples import ReadReport, Sample, VisionSample
from train.data.sources import ImageLoader, MixedData, read_all
from train.methods.checkpoints import last_checkpoint, step_of
from train.methods.delta import save_delta
from train.methods.policies import Applied, apply_policies
from train.methods.policy_model import Base, load_policy, load_processor, read_architecture, training_dtype
from train.stages.language import LanguageTask, measure
from train.stages.spec import (
    CHECKPOINTS,
    DELTA,
    LOG,
    StageRun,
    Step,
    append_step,
    base_of,
    curve,
    precision_conflict,
    read_steps,
    write_steps,
)
from train.stages.trainer import StageTrainer, StageWatch
from train.stages.vision.task import VisionTask
from train.stages.vision.words import WordsTask

PICTURE_BYTES = 2 << 30  # 77 000 pictures of 96 by 96
BAD_ROWS = 20  # told one by one in a report; all of them are counted


@dataclass(frozen=True)
class Listener:
    """Who hears of a stage: each step, the table of modules, how much of the data was measured (0..1).

    `check` is called between micro-batches and may raise to stop.
    """

    on_step: Callable[[Step], None] = lambda step: None
    on_table: Callable[[str], None] = lambda table: None
    on_measured: Callable[[float], None] = lambda share: None
    check: Callable[[], None] = lambda: None


def train_supervised(run: StageRun, listener: Listener) -> Json:
    """A stage `vision`, `words`, `align`, `sft` or `finetune` in this process, which may be one of several.

    Returns its report. Raises TrainingError: no data, a non-finite loss or gradient, a frozen module that changed.
    """
    started = time.monotonic()
    processor = load_processor(run.master)
    data = read_data(run)
    pictured = any(isinstance(one, VisionSample) or bool(one.images) for one in data)
    if not pictured and not run.stage.policies["language_model"].trains:
        raise TrainingError(
            f"stage {run.stage.name!r} trains what reads pictures, and no picture is in its data", code="no_data"
        )
    measured = measure_data(run, processor, data, listener)
    transformers.set_seed(run.stage.seed)
    applied = _load(run)
    task = _task(run, applied, processor, data, measured)
    log = StageLog(run)

    def on_step(step: Step) -> None:
        log.add(step)
        listener.on_step(step)

    watch = StageWatch(on_step, listener.check)
    options = {"processes": run.processes, "bf16": applied.mixed or precision(run).autocast}
    trainer = StageTrainer(task, task.plan, run.stage, run.folder / CHECKPOINTS, watch, **options)
    _require_covered(applied, trainer.create_optimizer())
    if trainer.args.should_log:
        listener.on_table(applied.table())
    checkpoint = last_checkpoint(run.folder / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.stopped is not None:
        raise watch.stopped
    went_on = trainer.state.global_step > (step_of(checkpoint) if checkpoint else 0)
    _save(run, applied, trainer, pictured and went_on)
    if not trainer.args.should_log:
        return {}  # only the first process hears of steps
    told = report(run.stage, log.steps, applied, time.monotonic() - started)
    return told | {"data": data_report(data), "task": task.report()}


def measure_data(run: StageRun, processor: Any, data: MixedData, listener: Listener) -> Json:
    """What `train.stages.language.measure` tells of a stage's conversations; nothing for other kinds."""
    if run.stage.kind in LABELLED_KINDS:
        return {}

    def tick(done: int) -> None:
        listener.check()
        listener.on_measured(done / len(data))

    samples = cast("list[Sample]", data)
    return measure(processor, samples, image_loader(run), run.stage, run.folder / "measured.json", tick)


def read_data(run: StageRun) -> MixedData:
    """The stage's samples; pictures that rows carry go to the blobs. Raises as `train.data.sources.read`."""
    keep_image = into(Blobs(run.blobs)) if run.blobs else as_data_url
    return read_all(run.stage.data, run.stage.kind, keep_image=keep_image, seed=run.stage.seed)


@dataclass(frozen=True)
class Precision:
    """The weights' dtype, transformers' name of the attention (none: its choice), whether autocast is asked for."""

    dtype: torch.dtype
    attention: str | None = None
    autocast: bool = False


def precision(run: StageRun) -> Precision:
    """What the stage computes in on this machine.

    On a CPU bfloat16 means autocast too, and what trains stays float32. So does all of a vision stage's tower; a
    language model that is frozen or under a LoRA is held in bfloat16, because casting it in each pass was a third of a
    step. Attention is eager there, because torch's fused one has a slow backward in bfloat16 (16 rows of 120 tokens
    through 135M parameters on one core with AMX: 3.8 s a step eager, 9.8 s in float32). Raises TrainingError where it
    would be ignored.
    """
    wanted = run.stage.precision
    if wanted == "auto":
        return Precision(getattr(torch, run.dtype) if run.dtype else training_dtype())
    if because := precision_conflict(run.stage, _base(run), run.accelerate_config, run.dtype):
        raise TrainingError(because, param="precision")
    if wanted == "float32":
        return Precision(torch.float32)
    if torch.cuda.is_available():
        return Precision(torch.bfloat16)
    dtype = torch.float32 if run.stage.kind in LABELLED_KINDS else torch.bfloat16
    return Precision(dtype, attention="eager", autocast=True)


def report(stage: RecipeStage, steps: list[Step], applied: Applied, seconds: float) -> Json:
    """What a manifest keeps of a stage: settings, modules, curve. `seconds` are this attempt's."""
    return {
        **summary(steps),
        "name": stage.name,
        "kind": stage.kind,
        "settings": stage.model_dump(mode="json", exclude={"name", "kind"}, exclude_defaults=True),
        "modules": {row.module: asdict(row) | applied.policies[row.module].record() for row in applied.rows},
        "trainable_parameters": applied.trainable,
        "dtype": str(next(applied.model.parameters()).dtype).removeprefix("torch."),
        "frozen": dict(applied.frozen_hashes),
        "seconds": round(seconds, 1),
    }


def summary(steps: list[Step]) -> Json:
    """Figures and curve of a log. `loss_last` is the mean over the last tenth of the steps."""
    if not steps:
        raise TrainingError("no step was taken", code="no_data")
    last = steps[-max(1, len(steps) // 10) :]
    spent = sum(step.seconds for step in steps)
    return {
        "steps": len(steps),
        "loss_first": steps[0].loss,
        "loss_last": sum(step.loss for step in last) / len(last),
        "tokens": sum(step.tokens for step in steps),
        "tokens_per_s": round(sum(step.tokens for step in steps) / spent, 1) if spent else 0.0,
        "curve": curve(steps),
    }


def data_report(data: MixedData) -> Json:
    """The data's hash, and of each source what became of its rows."""
    return {"sha256": data.sha256, "samples": len(data), "sources": [_source(one) for one in data.reports]}


def _source(one: ReadReport) -> Json:
    bad = [str(row) for row in one.bad[:BAD_ROWS]]
    return {"source": one.source, "format": one.format, "counts": one.counts, "sha256": one.sha256, "bad": bad}


def image_loader(run: StageRun, memory: int = 0) -> ImageLoader:
    """The pictures of the stage's data, which the recipe names; `memory` is `ImageLoader`'s."""
    return ImageLoader(Blobs(run.blobs).get if run.blobs else None, named=True, memory=memory)


def picture_memory(processes: int) -> int:
    """Bytes that a vision stage may fill with pixels: its steps are short, and drawing would be a fifth of them."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(PICTURE_BYTES, whole // 8) // processes


class StageLog:
    """The log's file and the steps in it; those after the checkpoint that is gone on from are forgotten."""

    def __init__(self, run: StageRun) -> None:
        self.path = run.folder / LOG
        checkpoint = last_checkpoint(run.folder / CHECKPOINTS)
        done = step_of(checkpoint) if checkpoint else 0
        self.steps = [step for step in read_steps(self.path) if step.step <= done]
        if os.environ.get("RANK", "0") == "0":
            write_steps(self.path, self.steps)

    def add(self, step: Step) -> None:
        """One step more; only the first process hears of steps."""
        self.steps.append(step)
        append_step(self.path, step)


def _load(run: StageRun) -> Applied:
    architecture = read_architecture(run.master)
    how = precision(run)
    model = load_policy(
        run.master,
        run.deltas,
        architecture,
        how.dtype,
        base=_base(run),
        serving=run.serving,
        attention=how.attention,
    )
    return apply_policies(model, architecture, run.stage.policies)


def _base(run: StageRun) -> Base:
    return cast(Base, base_of(run.stage, run.base))


def _task(
    run: StageRun, applied: Applied, processor: Any, data: MixedData, measured: Json
) -> LanguageTask | VisionTask | WordsTask:
    if run.stage.kind in LABELLED_KINDS:
        load_image = image_loader(run, picture_memory(run.processes))
        task = VisionTask if run.stage.kind == "vision" else WordsTask
        return task(applied, processor, cast("list[VisionSample]", data), load_image, run.stage)
    return LanguageTask(applied, processor, cast("list[Sample]", data), image_loader(run), run.stage, measured)


def _require_covered(applied: Applied, optimizer: Any) -> None:
    """The heads of a vision stage are no part of the model: their group names no module."""
    groups = [group for group in optimizer.param_groups if "module" in group]
    applied.require_covered(SimpleNamespace(param_groups=groups))


def _save(run: StageRun, applied: Applied, trainer: StageTrainer, pictured: bool) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not sharded:  # shards cannot be hashed; their frozen tensors have no gradient and no optimiser
        applied.require_frozen(pictures=pictured)
    if trainer.args.should_save:
        policies = {module: policy.record() for module, policy in applied.policies.items()}
        save_delta(applied.model, run.folder / DELTA, policies, state=state)
    trainer.accelerator.wait_for_everyone()
