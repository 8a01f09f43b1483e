"""Stage `snapshot`: can this job run at all, and on exactly which judgements.

Comes in: the live version, the store's preferences or thumbs. Goes out: `snapshot.json` (the frozen choice, and which
conversations calibrate and verify), the store's snapshot row, and a hand-over naming parent and hash.
Imports transformers inside its function only: the daemon that waits stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from noria.errors import Conflict
from noria.methods.table import reads_of
from noria.records import Completion, Json, Pair, Snapshot, Thumb
from train.data import calibration, snapshot
from train.data.pairs import PairRenderer, Renderer, Text, ThumbRenderer
from train.data.render import ChatRenderer
from train.data.snapshot import Judged
from train.pipeline.context import JobContext
from train.pipeline.files import once, read_json
from train.pipeline.lineage import Parent, find_parent, live_version, require_disk

FILE = "snapshot.json"


def run(ctx: JobContext) -> Json:
    """Refuses (Conflict, TrainingError, UnsupportedModel) or freezes the choice."""
    content = once(ctx.folder / FILE, lambda: _choice(ctx))
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
    ctx.store.note_uses(ctx.job.id, uses_of(content))
    return {key: content[key] for key in ("id", "sha256", "parent", "counts")}


def uses_of(content: Json) -> dict[str, list[str]]:
    """Ids of users' conversations and judgements in a snapshot that the store's own snapshot does not hold, by part.

    `prompts` are those that GRPO asks, of the job or of a recipe's stages; with these the store can tell which versions
    learnt from somebody (docs/privacy.md).
    """
    asked = content.get("prompts") or {}
    frozen = [asked] if "captured" in asked else list(asked.values())
    prompts = [id_ for one in frozen for ids in one["captured"].values() for id_ in ids]
    kinds = ("completion", "preference", "feedback")
    samples = {
        part: [ref[kind] for ref in content["samples"].get(part, ()) for kind in kinds if kind in ref]
        for part in ("calibration", "verification")
    }
    return {"prompts": prompts, **samples}


def parent_of(ctx: JobContext) -> Parent:
    """The parent that the snapshot stage fixed, whatever has become live since."""
    return find_parent(ctx.registry, ctx.settings.home, ctx.done["snapshot"]["parent"])


def frozen_pairs(ctx: JobContext, part: str) -> list[Pair]:
    """The snapshot's pairs of one part (`train`, `held_out`), in its order; those deleted since are left out."""
    return _frozen(ctx, part, (pair for _, pair in ctx.store.training_pairs() if pair is not None), "pairs")


def frozen_thumbs(ctx: JobContext, part: str) -> list[Thumb]:
    """The same of a snapshot of thumbs."""
    return _frozen(ctx, part, ctx.store.training_thumbs(), "thumbs")


def frozen_rows(ctx: JobContext, part: str) -> list[Pair] | list[Thumb]:
    """Whichever of both the job's method learns from."""
    return frozen_thumbs(ctx, part) if reads_of(ctx.job.method) == "thumbs" else frozen_pairs(ctx, part)


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


def _choice(ctx: JobContext) -> Json:
    if ctx.recipe is not None:
        from train.stages.job import freeze

        return freeze(ctx)
    if reads_of(ctx.job.method) == "prompts":
        from train.methods.grpo.job import freeze as freeze_prompts

        return freeze_prompts(ctx)
    return _freeze(ctx)


def _freeze(ctx: JobContext) -> Json:
    parent = find_parent(ctx.registry, ctx.settings.home, live_version(ctx.registry))
    master_bytes = sum(path.stat().st_size for path in parent.master.glob("*.safetensors"))
    require_disk(master_bytes, ctx.settings.jobs_dir)
    if reads_of(ctx.job.method) == "thumbs":
        return _content(ctx, parent, _select_thumbs(ctx, parent))
    return _content(ctx, parent, _select(ctx, parent))


def _content(ctx: JobContext, parent: Parent, selection: snapshot.Selection[Judged]) -> Json:
    frozen = snapshot.freeze(selection, job_id=ctx.job.id, created_at=ctx.job.created_at)
    counts = (ctx.train.quantize.calibration_samples, ctx.train.verify.samples)
    samples = calibration.choose(
        selection.train,
        selection.held_out,
        recent(ctx, sum(counts)),
        counts,
        lambda h: snapshot.is_held_out(h, ctx.train.held_out),
    )
    return {
        **snapshot.canonical(selection),
        "id": frozen.id,
        "sha256": f"sha256:{snapshot.content_hash(selection)}",
        "parent": parent.version,
        "samples": samples,
    }


def _select(ctx: JobContext, parent: Parent) -> snapshot.Selection[Pair]:
    from train.methods.policy_model import load_processor

    measure = PairRenderer(ChatRenderer(load_processor(parent.master)), ctx.images)
    rows = ctx.store.training_pairs(exclude_used=ctx.train.preferences == "unused")
    unfit = _unfit(ctx, measure)
    selection = snapshot.select(rows, held_out=ctx.train.held_out, unfit=unfit)
    if len(selection.train) < ctx.train.min_pairs:
        raise Conflict(_too_few(ctx, selection.counts, "preferences", "training pairs"), code="too_few_preferences")
    return selection


def _select_thumbs(ctx: JobContext, parent: Parent) -> snapshot.Selection[Thumb]:
    from train.methods.policy_model import load_processor

    measure = ThumbRenderer(ChatRenderer(load_processor(parent.master)), ctx.images)
    rows = ctx.store.training_thumbs(exclude_used=ctx.train.preferences == "unused")
    unfit = _unfit(ctx, measure)
    selection = snapshot.select_thumbs(rows, held_out=ctx.train.held_out, unfit=unfit)
    if len(selection.train) < ctx.train.min_pairs:
        raise Conflict(_too_few(ctx, selection.counts, "thumbs", "training answers"), code="too_few_thumbs")
    if len({thumb.up for thumb in selection.train}) < 2:
        way = "up" if selection.train[0].up else "down"
        raise Conflict(
            f"all {len(selection.train)} training answers have a thumb {way}: there is nothing to tell apart; record "
            "thumbs of the other kind",
            code="one_sided",
        )
    return selection


def _unfit(ctx: JobContext, renderer: Renderer[Judged, Text]) -> Callable[[Judged], str | None]:
    """What only a look at the rendered texts can tell, as `snapshot.select` asks it."""
    longest: int = getattr(ctx.train, ctx.job.method).max_length

    def unfit(row: Judged) -> str | None:
        ctx.check()
        if not renderer.is_readable(row):
            return "unreadable"
        return "too_long" if renderer.tokens(row) > longest else None

    return unfit


def _too_few(ctx: JobContext, counts: dict[str, int], what: str, made: str) -> str:
    needed, which = ctx.train.min_pairs, ctx.train.preferences
    rest = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n and reason not in ("total", "used"))
    advice = "record more, or lower train.min_pairs"
    if which == "unused":
        advice += ', or train on all again with settings {"preferences": "all"}'
    told = f"too few {what}: {counts['total']} {which} ones make {counts['used']} {made}"
    return f"{told}, {needed} are needed" + (f" ({rest})" if rest else "") + f"; {advice}"


def _frozen(ctx: JobContext, part: str, rows: Iterable[Judged], what: str) -> list[Judged]:
    content = snapshot_file(ctx)
    stored = {snapshot.judgement_id(row): row for row in rows}
    found = [stored[i] for i, digest in content[part] if i in stored and snapshot.row_digest(stored[i]) == digest]
    gone = len(content[part]) - len(found)
    if gone:
        ctx.note(f"{gone} {part} {what} of the snapshot were deleted since", gone=gone, part=part)
    return found
