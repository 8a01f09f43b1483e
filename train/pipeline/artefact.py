"""Stages `merge`, `quantize` and `verify`: from a trained delta to the very checkpoint that would serve, checked.

Comes in: the job's deltas, the lineage, conversations. Goes out: `merged/`, `serving/`, `probe.json`, their reports.
Each folder appears by rename, and its report after it, so an attempt that is cut off leaves nothing half done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from noria.errors import TrainingError
from noria.records import MODULES, Json, Module
from train.data import calibration
from train.data.snapshot import judgement_id
from train.methods.delta import changed_modules, delta_folders
from train.pipeline.context import JobContext
from train.pipeline.files import once, remove
from train.pipeline.prepare import frozen_rows, parent_of, snapshot_file

KEPT = "none: the language model was frozen, its quantised weights are the parent's"

if TYPE_CHECKING:
    from train.export.rendering import CalibrationSample


def merge(ctx: JobContext) -> Json:
    """The lineage's deltas and the job's own folded into the master."""
    from train.export.merge import merge as fold

    def produce() -> Json:
        ctx.check()
        parent = parent_of(ctx)
        out = ctx.folder / "merged"
        remove(out)
        deltas = [*parent.adapters, ctx.folder / "adapter"]
        frozen = frozen_modules(ctx)
        return asdict(fold(parent.master, deltas, out, ctx.check, parent=parent.serving, frozen=frozen))

    return once(ctx.folder / "merge.json", produce)


def quantize(ctx: JobContext) -> Json:
    """GPTQ over the merged model.

    Raises IntegrityError or TrainingError when a module that the job left frozen is not the parent's, byte for byte.
    """
    from train.export.quantize import quantize as gptq

    def produce() -> Json:
        parent, frozen = parent_of(ctx), frozen_modules(ctx)
        recipe, found = KEPT, list[tuple[Json, "CalibrationSample"]]()
        if "language_model" not in frozen:
            ctx.store.clear_forgotten_uses(ctx.job.id, ("calibration",))  # those are gone from what is read now
            recipe, found = _conversations(ctx, "calibration", ctx.train.quantize.calibration_samples)
        out = ctx.folder / "serving"
        remove(out)
        report = gptq(
            ctx.folder / "merged",
            parent.serving,
            [sample for _, sample in found],
            out,
            ctx.train.quantize,
            lambda share: ctx.progress("quantize", share),
            frozen,
        )
        told = asdict(report)
        told["calibration"] = {
            "recipe": recipe,
            "samples": [{**ref, "sha256": calibration.fingerprint(sample.messages)} for ref, sample in found],
        }
        return told

    told = once(ctx.folder / "quantize.json", produce)
    require_frozen(ctx, told["frozen"])
    return {key: told[key] for key in ("frozen", "quantization", "seconds")}


def verify(ctx: JobContext) -> Json:
    """Per-token KL, agreement and finiteness of the artefact against the merged model, and the probe for the server."""
    from train.export.verify import verify as check_artefact

    def produce() -> Json:
        ctx.check()
        recipe, found = _conversations(ctx, "verification", ctx.train.verify.samples)
        samples = [sample for _, sample in found]
        report = check_artefact(
            ctx.folder / "serving",
            ctx.folder / "merged",
            samples,
            ctx.folder / "probe.json",
            ctx.train.verify,
            ctx.check,
        )
        chosen = snapshot_file(ctx)["samples"]
        return {**asdict(report), "on_calibration": recipe == chosen["recipe"] and chosen["verified_on_calibration"]}

    told = once(ctx.folder / "verify.json", produce)
    ctx.metrics({key: told[key] for key in ("mean_kl", "max_kl", "agreement") if key in told})
    return told


def frozen_modules(ctx: JobContext) -> tuple[Module, ...]:
    """The modules that none of the job's deltas trained."""
    trained = changed_modules(delta_folders(ctx.folder / "adapter"))
    return tuple(module for module in MODULES if module not in trained)


def require_frozen(ctx: JobContext, made: Mapping[str, str]) -> None:
    """Raises TrainingError naming a frozen module whose serving tensors are not those in the parent's manifest.

    A module that the parent itself trained has no hash there; `quantize` has compared it with the parent's files.
    """
    parent = parent_of(ctx).manifest.frozen
    for module in frozen_modules(ctx):
        if made.get(module) != parent.get(module, made.get(module)) or module not in made:
            raise TrainingError(
                f"{module} is frozen, but its tensors hash to {made.get(module)} and the parent's to "
                f"{parent.get(module)}",
                code="not_frozen",
            )


def _conversations(ctx: JobContext, part: str, count: int) -> tuple[str, list[tuple[Json, CalibrationSample]]]:
    """The snapshot's conversations of one part with the recipe that chose them; the general ones where it has none."""
    from train.models import conversations

    chosen = snapshot_file(ctx)["samples"]
    rows = {judgement_id(row): row for split in ("train", "held_out") for row in frozen_rows(ctx, split)}
    found = calibration.samples(chosen[part], rows, ctx.store.get_completion, ctx.images, ctx.data_images)
    if gone := len(chosen[part]) - len(found):
        ctx.note(f"{gone} {part} conversations were deleted since, or cannot be read", gone=gone, part=part)
    if found:
        return chosen["recipe"], found
    made = conversations.calibration_samples(count) if part == "calibration" else conversations.held_out_samples()
    return conversations.RECIPE, [({"general": number}, sample) for number, sample in enumerate(made[:count])]
