"""Runs a job's stages in order, from the first that is not done, and ends the job whichever way it goes.

Comes in: a claimed job in its context. Goes out: the job's end in the store, or a lease handed back.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

from noria.errors import LeaseLost, NoriaError
from noria.records import STAGES, Json, Stage
from train.heartbeat import CANCELLED, SHUTDOWN
from train.pipeline import artefact, learn, prepare, release
from train.pipeline.context import JobContext
from train.pipeline.files import clean

RunStage = Callable[[JobContext], Json]
PIPELINE: Mapping[Stage, RunStage] = {
    "snapshot": prepare.run,
    "train": learn.run,
    "merge": artefact.merge,
    "quantize": artefact.quantize,
    "verify": artefact.verify,
    "publish": release.publish,
    "rollout": release.rollout,
}


def run_job(ctx: JobContext, pipeline: Mapping[Stage, RunStage] = PIPELINE) -> str:
    """Runs one job to its end; returns `succeeded`, `failed`, `cancelled`, `released` or `lost`.

    Never raises for what goes wrong in a stage: it becomes the job's error. Errors of the store itself go up.
    """
    try:
        _run_stages(ctx, pipeline)
        version = ctx.done.get("publish", {}).get("version")
        ctx.store.finish_job(ctx.job.id, ctx.owner, "succeeded", version=version)
        outcome = "succeeded"
    except LeaseLost as stop:
        return _stopped(ctx, stop)
    except NoriaError as error:
        outcome = _failed(ctx, error.code, error.message)
    except Exception as error:  # noqa: BLE001 - the pipeline's edge: torch, TRL and gptqmodel raise anything
        _keep_traceback(ctx)
        outcome = _failed(ctx, "internal_error", f"{type(error).__name__}: {error}")
    if outcome != "lost":
        clean(ctx.folder, ctx.train.keep_merged)
    return outcome


def _run_stages(ctx: JobContext, pipeline: Mapping[Stage, RunStage]) -> None:
    ctx.folder.mkdir(parents=True, exist_ok=True)
    ctx.done = dict(ctx.job.done)
    for stage in STAGES:
        if stage in ctx.done:
            ctx.log.event("stage_done_before", job_id=ctx.job.id, stage=stage)
            continue
        ctx.log.event("stage", job_id=ctx.job.id, stage=stage)
        ctx.begin(stage)
        handover = pipeline[stage](ctx)
        ctx.store.finish_stage(ctx.job.id, ctx.owner, stage, handover)
        ctx.done[stage] = handover


def _stopped(ctx: JobContext, stop: LeaseLost) -> str:
    """The work was told to stop: by an operator, by the machine, or because another trainer has the job."""
    try:
        if stop.code == SHUTDOWN:
            ctx.store.release_job(ctx.job.id, ctx.owner)
            return "released"
        if stop.code == CANCELLED:
            if ctx.store.get_job(ctx.job.id).state == "running":
                ctx.store.finish_job(ctx.job.id, ctx.owner, "cancelled")
            clean(ctx.folder, ctx.train.keep_merged)
            return "cancelled"
    except LeaseLost as error:
        stop = error
    ctx.log.event("lease_lost", job_id=ctx.job.id, why=stop.message)
    return "lost"


def _failed(ctx: JobContext, code: str, message: str) -> str:
    ctx.log.event("job_failed", job_id=ctx.job.id, code=code, message=message)
    try:
        ctx.store.finish_job(ctx.job.id, ctx.owner, "failed", error={"code": code, "message": message})
    except LeaseLost as error:
        ctx.log.event("lease_lost", job_id=ctx.job.id, why=error.message)
        return "lost"
    return "failed"


def _keep_traceback(ctx: JobContext) -> None:
    ctx.folder.mkdir(parents=True, exist_ok=True)
    (ctx.folder / "error.txt").write_text(traceback.format_exc())
