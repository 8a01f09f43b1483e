"""Stage `train`: the method runs and leaves an adapter.

Comes in: the snapshot's training pairs, or thumbs, and the parent. Goes out: `adapter/`, `train/log.jsonl` with one
line a step, `train/report.json`; every step's figures in the job's events. A restart begins again with the same seed.
A job with a recipe runs its stages instead (`train.stages.job`), one of method `grpo` its own (`train.methods.grpo`);
both go on from their last checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from noria.errors import TrainingError
from noria.methods.table import reads_of
from noria.records import Json
from noria.store.privacy.lineage import TRAINED
from train.data.pairs import PairRenderer, ThumbRenderer
from train.data.render import ChatRenderer
from train.pipeline.context import JobContext
from train.pipeline.files import once, remove
from train.pipeline.prepare import frozen_pairs, frozen_thumbs, parent_of

REPORT = "train/report.json"
LEARNT = (
    *("steps", "pairs", "answers", "up", "down", "loss_first", "loss_last", "margin_last", "accuracy_last"),
    *("reward_first", "reward_last"),
)
"""Figures of the report that a job and a version tell, as far as the method has them."""

if TYPE_CHECKING:
    from train.methods.policies import Applied
    from train.methods.preferences.method import Judgements
    from train.methods.preferences.steps import Step


def run(ctx: JobContext) -> Json:
    """Trains, unless a report says that it was done. A recipe's stages and their curves stay in the report.

    When an end user is forgotten whose data it has read, it begins again without: what was learnt is thrown away.
    """
    while True:
        _unlearn(ctx)
        told = once(ctx.folder / REPORT, lambda: _learn(ctx))
        if not _forgotten(ctx):
            return {key: value for key, value in told.items() if key not in ("stages", "recipe")}


def _forgotten(ctx: JobContext) -> int:
    """How much of what the job trains on was deleted with its end user since the snapshot, or the last beginning."""
    uses = ctx.store.forgotten_uses(ctx.job.id)
    return sum(count for part, count in uses.items() if part in TRAINED)


def _unlearn(ctx: JobContext) -> None:
    """Throws away what an attempt has learnt from users who were forgotten meanwhile; checkpoints hold it too."""
    gone = _forgotten(ctx)
    if not gone:
        return
    ctx.store.clear_forgotten_uses(ctx.job.id)  # first: what is deleted from here on marks the job again
    learnt = [folder for folder in (ctx.folder / "train", ctx.folder / "adapter") if folder.exists()]
    for folder in learnt:
        remove(folder)
    again = "training begins again without them" if learnt else "training begins without them"
    ctx.note(f"{gone} of what the job was to learn from were forgotten with their end users; {again}", gone=gone)


def _learn(ctx: JobContext) -> Json:
    if ctx.recipe is not None:
        from train.stages.job import train

        return train(ctx)
    if reads_of(ctx.job.method) == "prompts":
        from train.methods.grpo.job import train as train_on_groups

        return train_on_groups(ctx)
    return _train(ctx)


def _train(ctx: JobContext) -> Json:
    from train.methods.policy_model import load_processor
    from train.methods.preferences.method import train_method

    parent = parent_of(ctx)
    images = ctx.images
    renderer = ChatRenderer(load_processor(parent.master))
    if reads_of(ctx.job.method) == "thumbs":
        thumbs = ThumbRenderer(renderer, images)
        judgements: Judgements = [thumbs.render(thumb) for thumb in frozen_thumbs(ctx, "train")]
    else:
        pairs = PairRenderer(renderer, images)
        judgements = [pairs.render(pair) for pair in frozen_pairs(ctx, "train")]
    if not judgements:
        raise TrainingError("every training row of the snapshot was deleted since", code="snapshot_gone")
    out = ctx.folder / "adapter"
    remove(out)
    log_path = ctx.folder / "train" / "log.jsonl"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", buffering=1) as log:
        report = train_method(
            parent.master,
            parent.adapters,
            judgements,
            images,
            out,
            getattr(ctx.train, ctx.job.method),
            ctx.train.policies(),
            on_step=lambda step: _report(ctx, step, log),
            check=ctx.check,
            on_ready=lambda applied: report_modules(ctx, applied),
            base=ctx.train.base,
            serving=parent.serving,
        )
    told = asdict(report)
    told |= told.pop("learnt_from")
    ctx.metrics({key: told[key] for key in LEARNT if told.get(key) is not None})
    return told


def report_modules(ctx: JobContext, applied: Applied) -> None:
    """The table of who trains: into the job's history, the log and, as it stands, into `train/modules.txt`."""
    (ctx.folder / "train" / "modules.txt").write_text(applied.table() + "\n")
    ctx.note("modules:\n" + applied.table(), modules=[asdict(row) for row in applied.rows])


def _report(ctx: JobContext, step: Step, log: TextIO) -> None:
    line = step.to_json()
    log.write(json.dumps(line) + "\n")
    ctx.store.add_event(ctx.job.id, "metrics", line)
    told = {key: line[key] for key in ("step", "steps", "loss", "margin") if key in line}
    ctx.log.event("step", job_id=ctx.job.id, **told)
    ctx.progress("train", step.step / max(1, step.steps))
