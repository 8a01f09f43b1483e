"""Stage `snapshot`: can this job run at all, and on exactly which judgements.

Comes in: the live version, the store's preferences. Goes out: `snapshot.json` (the frozen choice, and which
conversations calibrate and verify), the store's snapshot row, and a hand-over naming parent and hash.
Imports transformers inside its function only: the daemon that waits stays small.
"""

from __future__ import annotations

from noria.errors import Conflict
from noria.records import Completion, Json, Pair, Snapshot
from train.data import calibration, snapshot
from train.data.pairs import PairRenderer
from train.data.render import ChatRenderer
from train.pipeline.context import JobContext
from train.pipeline.files import once, read_json
from train.pipeline.lineage import Parent, find_parent, live_version, require_disk

FILE = "snapshot.json"


def run(ctx: JobContext) -> Json:
    """Refuses (Conflict, TrainingError, UnsupportedModel) or freezes the choice."""
    content = once(ctx.folder / FILE, lambda: _frozen(ctx))
    if unreadable := content["samples"].get("unreadable"):
        told = "recent conversations show what was not stored, and cannot calibrate"
        ctx.note(f"{unreadable} {told}", unreadable=unreadable)
    ctx.store.add_snapshot(
        Snapshot(
            id=content["id"],
            job_id=ctx.job.id,
            created_at=ctx.job.created_at,
            train=tuple(id_ for id_, _ in content["train"]),
            held_out=tuple(id_ for id_, _ in content["held_out"]),
            counts=content["counts"],
            left_out=tuple(content["left_out"]),
        )
    )
    return {key: content[key] for key in ("id", "sha256", "parent", "counts")}


def parent_of(ctx: JobContext) -> Parent:
    """The parent that the snapshot stage fixed, whatever has become live since."""
    return find_parent(ctx.registry, ctx.settings.home, ctx.done["snapshot"]["parent"])


def frozen_pairs(ctx: JobContext, part: str) -> list[Pair]:
    """The snapshot's pairs of one part (`train`, `held_out`), in its order; those deleted since are left out."""
    content = snapshot_file(ctx)
    stored = {pair.preference_id: pair for _, pair in ctx.store.training_pairs() if pair is not None}
    found = [stored[id_] for id_, digest in content[part] if id_ in stored and _same(stored[id_], digest)]
    gone = len(content[part]) - len(found)
    if gone:
        ctx.note(f"{gone} {part} pairs of the snapshot were deleted since", gone=gone, part=part)
    return found


def snapshot_file(ctx: JobContext) -> Json:
    """What the snapshot stage wrote. Raises Conflict when it is gone."""
    content = read_json(ctx.folder / FILE)
    if content is None:
        raise Conflict(f"{ctx.folder / FILE} is gone; start a new job", code="snapshot_gone")
    return content


def recent(ctx: JobContext, count: int) -> list[Completion]:
    """Recent conversations with and without pictures in turn, as many of each as there are."""
    pictured = ctx.store.recent_completions(count, "vision")
    plain = ctx.store.recent_completions(count, "text")
    mixed: list[Completion] = []
    for index in range(max(len(pictured), len(plain))):
        mixed += pictured[index : index + 1] + plain[index : index + 1]
    return mixed


def _frozen(ctx: JobContext) -> Json:
    if ctx.recipe is not None:
        from train.stages.job import freeze

        return freeze(ctx)
    if ctx.job.method == "grpo":
        from train.methods.grpo.job import freeze as freeze_prompts

        return freeze_prompts(ctx)
    return _freeze(ctx)


def _freeze(ctx: JobContext) -> Json:
    parent = find_parent(ctx.registry, ctx.settings.home, live_version(ctx.registry))
    master_bytes = sum(path.stat().st_size for path in parent.master.glob("*.safetensors"))
    require_disk(master_bytes, ctx.settings.jobs_dir)
    selection = _select(ctx, parent)
    frozen = snapshot.freeze(selection, job_id=ctx.job.id, created_at=ctx.job.created_at)
    train, held_out = selection.train, selection.held_out
    counts = (ctx.train.quantize.calibration_samples, ctx.train.verify.samples)
    samples = calibration.choose(
        train, held_out, recent(ctx, sum(counts)), counts, lambda h: snapshot.is_held_out(h, ctx.train.held_out)
    )
    return {
        **snapshot.canonical(selection),
        "id": frozen.id,
        "sha256": f"sha256:{snapshot.content_hash(selection)}",
        "parent": parent.version,
        "samples": samples,
    }


def _select(ctx: JobContext, parent: Parent) -> snapshot.Selection:
    from train.methods.policy_model import load_processor

    train = ctx.train
    measure = PairRenderer(ChatRenderer(load_processor(parent.master)), ctx.images)

    def unfit(pair: Pair) -> str | None:
        ctx.check()
        if not measure.is_readable(pair):
            return "unreadable"
        return "too_long" if measure.tokens(pair) > train.dpo.max_length else None

    rows = ctx.store.training_pairs(exclude_used=train.preferences == "unused")
    selection = snapshot.select(rows, held_out=train.held_out, unfit=unfit)
    if len(selection.train) < train.min_pairs:
        raise Conflict(_too_few(selection.counts, train.min_pairs, train.preferences), code="too_few_preferences")
    return selection


def _too_few(counts: dict[str, int], needed: int, which: str) -> str:
    rest = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n and reason not in ("total", "used"))
    advice = "record more, or lower train.min_pairs"
    if which == "unused":
        advice += ', or train on all again with settings {"preferences": "all"}'
    told = f"too few preferences: {counts['total']} {which} ones make {counts['used']} training pairs"
    return f"{told}, {needed} are needed" + (f" ({rest})" if rest else "") + f"; {advice}"


def _same(pair: Pair, digest: str) -> bool:
    return snapshot.pair_digest(pair) == digest
