"""Stages `publish` and `rollout`: the artefact becomes a version, and the server is asked to put it live.

Comes in: `adapter/`, `serving/`, `probe.json` and the reports before. Goes out: a version in the registry, and what
became of its rollout. A rollout that fails does not fail the job: the version exists, and the metrics say so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, cast

from noria.errors import Conflict
from noria.methods.table import METHODS
from noria.records import MODULES, Json, Rollout
from noria.registry import STAGING, ManifestDraft
from train.methods.delta import delta_folders, read_policies
from train.pipeline.artefact import require_frozen
from train.pipeline.context import JobContext
from train.pipeline.files import link_tree, read_json, remove
from train.pipeline.learn import LEARNT, REPORT
from train.pipeline.prepare import parent_of

SERVER_FRESH_S = 15.0
POLL_S = 0.5


def publish(ctx: JobContext) -> Json:
    """Publishes once: a job that has a version already gets that one."""
    for left in ctx.settings.models_dir.glob(f"{STAGING}{ctx.job.id}-*"):  # by an attempt that was killed here
        remove(left)
    staging = ctx.registry.begin(ctx.job.id)
    for name in ("adapter", "serving"):
        link_tree(ctx.folder / name, staging / name)
    shutil.copy2(ctx.folder / "probe.json", staging / "probe.json")
    manifest = ctx.registry.publish(staging, _draft(ctx))
    ctx.metrics({"version": manifest.id})
    ctx.log.event("published", job_id=ctx.job.id, version=manifest.id)
    return {"version": manifest.id}


def rollout(ctx: JobContext) -> Json:
    """Asks for the rollout and waits for the server, or leaves it queued where no server is up."""
    version: str = ctx.done["publish"]["version"]
    if ctx.job.rollout == "none":
        return {"state": "none"}
    made = _request(ctx, version)
    while made is not None and made.state in ("queued", "running"):
        ctx.check()
        if not ctx.store.processes("server", fresh_s=SERVER_FRESH_S):
            break
        ctx.wait(POLL_S)
        made = ctx.store.get_rollout(made.id)
    told = _told(version, made)
    ctx.metrics({"rollout": told})
    ctx.note(told["note"], version=version)
    return told


def _request(ctx: JobContext, version: str) -> Rollout | None:
    """This job's rollout, made now or by an earlier attempt; None where another one is open and no server ends it."""
    while True:
        ctx.check()
        mine = [one for one in ctx.store.list_rollouts(100) if one.version == version]
        if mine:
            return mine[0]
        try:
            return ctx.store.create_rollout(version, cast(Literal["direct", "canary"], ctx.job.rollout))
        except Conflict as error:
            if error.code != "rollout_under_way":
                raise
            if not ctx.store.processes("server", fresh_s=SERVER_FRESH_S):
                return None
        ctx.wait(POLL_S)


def _told(version: str, made: Rollout | None) -> Json:
    if made is None:
        return {"state": "none", "note": f"{version} is a candidate: another rollout is open and no server is up"}
    notes = {
        "succeeded": f"{version} went live",
        "failed": f"{version} is published, but its rollout failed: {made.reason}",
        "queued": f"{version} is published; its rollout waits for a server",
        "running": f"{version} is published; the server that was rolling it out has gone silent",
    }
    return {"id": made.id, "state": made.state, "reason": made.reason, "note": notes[made.state]}


def _draft(ctx: JobContext) -> ManifestDraft:
    parent = parent_of(ctx)
    trained, verified = read_json(ctx.folder / REPORT) or ctx.done["train"], ctx.done["verify"]
    quantized = read_json(ctx.folder / "quantize.json") or ctx.done["quantize"]
    require_frozen(ctx, quantized["frozen"])
    checked = ("mean_kl", "max_kl", "agreement")
    return ManifestDraft(
        parent=parent.version,
        base=parent.base,
        method=ctx.job.method,
        job=ctx.job.id,
        snapshot=ctx.done["snapshot"]["sha256"],
        modules=_policies(delta_folders(ctx.folder / "adapter")),
        stages=trained.get("stages", []),
        architecture=parent.manifest.architecture,
        quantization=quantized["quantization"],
        calibration=quantized.get("calibration", {}),
        metrics={
            **{key: trained[key] for key in LEARNT if trained.get(key) is not None},
            **{key: verified[key] for key in checked if key in verified},
            "counts": ctx.done["snapshot"]["counts"],
        },
        frozen=quantized["frozen"],
        settings=_settings(ctx),
        training={
            **{key: trained[key] for key in ("dtype", "frozen", "recipe") if key in trained},
            "snapshot_id": ctx.done["snapshot"]["id"],
        },
    )


def _settings(ctx: JobContext) -> Json:
    """What decided the outcome: the recipe, or the method's settings."""
    if ctx.recipe is not None:
        told = ctx.train.model_dump(mode="json", include={"quantize", "base", "processes"})
        return {**told, "recipe": ctx.recipe.model_dump(mode="json", exclude_defaults=True)}
    own = METHODS[ctx.job.method].keys
    return ctx.train.model_dump(mode="json", include={*own, "modules", "quantize", "held_out"})


def _policies(deltas: tuple[Path, ...]) -> dict[str, Json]:
    """Each module's policy in the job: over several deltas, the last one under which it trained."""
    told: dict[str, Json] = {module: {"policy": "frozen"} for module in MODULES}
    for delta in deltas:
        told |= {module: policy for module, policy in read_policies(delta).items() if policy["policy"] != "frozen"}
    return told
