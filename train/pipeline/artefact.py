"""Stages `merge`, `quantize` and `verify`: from an adapter to the very checkpoint that would serve, checked.

Comes in: the adapter, the lineage, conversations. Goes out: `merged/`, `serving/`, `probe.json` and their reports.
Each folder appears by rename, and its report after it, so an attempt that is cut off leaves nothing half done.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from noria.errors import TrainingError
from noria.records import Json
from train.data import calibration
from train.pipeline.context import JobContext
from train.pipeline.files import once, remove
from train.pipeline.prepare import frozen_pairs, parent_of, snapshot_file

if TYPE_CHECKING:
    from train.export.rendering import CalibrationSample


def merge(ctx: JobContext) -> Json:
    """The lineage's adapters and the new one folded into the master."""
    from train.export.merge import merge as fold

    def produce() -> Json:
        ctx.check()
        parent = parent_of(ctx)
        out = ctx.folder / "merged"
        remove(out)
        return asdict(fold(parent.master, [*parent.adapters, ctx.folder / "adapter"], out, ctx.check))

    return once(ctx.folder / "merge.json", produce)


def quantize(ctx: JobContext) -> Json:
    """GPTQ over the merged model. Raises TrainingError when tower or aligner are not the parent's, byte for byte."""
    from train.export.quantize import quantize as gptq

    def produce() -> Json:
        parent = parent_of(ctx)
        chosen = snapshot_file(ctx)["samples"]
        found = _samples(ctx, chosen["calibration"])
        out = ctx.folder / "serving"
        remove(out)
        report = gptq(
            ctx.folder / "merged",
            parent.master,
            [sample for _, sample in found],
            out,
            ctx.train.quantize,
            lambda share: ctx.progress("quantize", share),
        )
        told = asdict(report)
        told["calibration"] = {
            "recipe": chosen["recipe"],
            "samples": [{**ref, "sha256": calibration.fingerprint(sample.messages)} for ref, sample in found],
        }
        return told

    told = once(ctx.folder / "quantize.json", produce)
    require_frozen(told["frozen"], parent_of(ctx).manifest.frozen)
    return {key: told[key] for key in ("frozen", "quantization", "seconds")}


def verify(ctx: JobContext) -> Json:
    """Per-token KL, agreement and finiteness of the artefact against the merged model, and the probe for the server."""
    from train.export.verify import verify as check_artefact

    def produce() -> Json:
        ctx.check()
        chosen = snapshot_file(ctx)["samples"]
        found = [sample for _, sample in _samples(ctx, chosen["verification"])]
        report = check_artefact(
            ctx.folder / "serving", ctx.folder / "merged", found, ctx.folder / "probe.json", ctx.train.verify, ctx.check
        )
        return {**asdict(report), "on_calibration": chosen["verified_on_calibration"]}

    told = once(ctx.folder / "verify.json", produce)
    ctx.metrics({key: told[key] for key in ("mean_kl", "max_kl", "agreement") if key in told})
    return told


def require_frozen(made: dict[str, str], parent: dict[str, str]) -> None:
    """Raises TrainingError naming a frozen module whose serving tensors are not the parent's."""
    for module, expected in parent.items():
        if made.get(module) != expected:
            raise TrainingError(
                f"{module} is frozen, but its tensors hash to {made.get(module)} and the parent's to {expected}",
                code="not_frozen",
            )


def _samples(ctx: JobContext, references: list[Json]) -> list[tuple[Json, CalibrationSample]]:
    pairs = {pair.preference_id: pair for part in ("train", "held_out") for pair in frozen_pairs(ctx, part)}
    return calibration.samples(references, pairs, ctx.store.get_completion, ctx.images)
