"""Stage `train`: the method runs and leaves an adapter.

Comes in: the snapshot's training pairs and the parent. Goes out: `adapter/`, `train/log.jsonl` with one line a step,
`train/report.json`; every step's loss and margin in the job's events. A restart begins again with the same seed.
A job with a recipe runs its stages instead (`train.stages.job`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from noria.errors import TrainingError
from noria.records import Json
from train.data.pairs import PairRenderer
from train.data.render import ChatRenderer
from train.pipeline.context import JobContext
from train.pipeline.files import once, remove
from train.pipeline.prepare import frozen_pairs, parent_of

REPORT = "train/report.json"

if TYPE_CHECKING:
    from train.methods.dpo_trainer import Step
    from train.methods.policies import Applied


def run(ctx: JobContext) -> Json:
    """Trains, unless a report says that it was done. A recipe's stages and their curves stay in the report."""
    told = once(ctx.folder / REPORT, lambda: _learn(ctx))
    return {key: value for key, value in told.items() if key not in ("stages", "recipe")}


def _learn(ctx: JobContext) -> Json:
    if ctx.recipe is not None:
        from train.stages.job import train

        return train(ctx)
    if ctx.job.method == "grpo":
        from train.methods.grpo.job import train as train_on_groups

        return train_on_groups(ctx)
    return _train(ctx)


def _train(ctx: JobContext) -> Json:
    from train.methods.dpo import train_dpo
    from train.methods.policy_model import load_processor

    parent = parent_of(ctx)
    pairs = frozen_pairs(ctx, "train")
    if not pairs:
        raise TrainingError("every training pair of the snapshot was deleted since", code="snapshot_gone")
    images = ctx.images
    renderer = PairRenderer(ChatRenderer(load_processor(parent.master)), images)
    out = ctx.folder / "adapter"
    remove(out)
    log_path = ctx.folder / "train" / "log.jsonl"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", buffering=1) as log:
        report = train_dpo(
            parent.master,
            parent.adapters,
            [renderer.render(pair) for pair in pairs],
            images,
            out,
            ctx.train.dpo,
            ctx.train.policies(),
            on_step=lambda step: _report(ctx, step, log),
            check=ctx.check,
            on_ready=lambda applied: report_modules(ctx, applied),
            base=ctx.train.base,
            serving=parent.serving,
        )
    kept = ("steps", "pairs", "loss_first", "loss_last", "margin_last", "accuracy_last")
    told = asdict(report)
    ctx.metrics({key: told[key] for key in kept})
    return told


def report_modules(ctx: JobContext, applied: Applied) -> None:
    """The table of who trains: into the job's history, the log and, as it stands, into `train/modules.txt`."""
    (ctx.folder / "train" / "modules.txt").write_text(applied.table() + "\n")
    ctx.note("modules:\n" + applied.table(), modules=[asdict(row) for row in applied.rows])


def _report(ctx: JobContext, step: Step, log: TextIO) -> None:
    line = asdict(step)
    log.write(json.dumps(line) + "\n")
    ctx.store.add_event(ctx.job.id, "metrics", line)
    ctx.log.event("step", job_id=ctx.job.id, step=step.step, steps=step.steps, loss=step.loss, margin=step.margin)
    ctx.progress("train", step.step / max(1, step.steps))
