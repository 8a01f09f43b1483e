"""GRPO in the pipeline: what a job of method `grpo`, and a recipe's stage of kind `grpo`, freeze and run.

Comes in: a job in its context. Goes out: which prompts it asks, with their hash; the training's delta and report.
Captured prompts are frozen by their ids: what users ask meanwhile belongs to the next job, what they delete is gone.
Must not import `serve`; torch and TRL when a training begins.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from noria.errors import Conflict, NotFound, SettingsError
from noria.methods.grpo import CAPTURED, GrpoSettings, PromptSource, require_trainable
from noria.recipes import Recipe, RecipeStage
from noria.records import Completion, Json, Pair
from noria.rewards import RewardSettings
from train.data import calibration, snapshot
from train.data.samples import Sample
from train.methods.grpo.sampling.prompts import DEFAULT_COUNT, SourcePrompts, read_prompts
from train.methods.grpo.sampling.servers import Servers, addresses, key_of
from train.pipeline.context import JobContext
from train.pipeline.files import remove

if TYPE_CHECKING:
    from train.methods.grpo.method import Means
    from train.methods.policies import Applied
    from train.pipeline.lineage import Parent
    from train.rewards import Scorer
    from train.stages.run import Listener
    from train.stages.spec import StageRun, Step

RECIPE = "prompts whose answers are known with them, evenly spread, then recent completions of prompts not held out"
GIVE_UP_S = 5.0  # the pool tells so soon that it finds nobody; the method's patience lasts longer, and can be stopped


@dataclass(frozen=True)
class Frozen:
    """The prompts of one training: their hash, how many of each source, and the ids of those from conversations."""

    sha256: str
    counts: dict[str, int]
    captured: dict[str, list[str]]
    prompts: tuple[SourcePrompts, ...]

    def to_json(self) -> Json:
        """What a later attempt reads."""
        return {"sha256": self.sha256, "sources": [one.sha256 for one in self.prompts], "captured": self.captured}


def freeze(ctx: JobContext) -> Json:
    """The snapshot of a job of method `grpo`.

    Raises SettingsError (policies, no reward), Conflict, TrainingError: no prompt, no master, a disk too small.
    """
    from train.pipeline.lineage import find_parent, live_version, require_disk

    require_trainable(ctx.train.policies(), ctx.train.reward)
    parent = find_parent(ctx.registry, ctx.settings.home, live_version(ctx.registry))
    require_disk(sum(path.stat().st_size for path in parent.master.glob("*.safetensors")), ctx.settings.jobs_dir)
    found = freeze_prompts(ctx, ctx.train.grpo)
    digest = found.sha256.removeprefix("sha256:")
    return {
        "train": [],
        "held_out": [],
        "left_out": [],
        "counts": found.counts,
        "id": f"prompts_{digest[:24]}",
        "sha256": found.sha256,
        "parent": parent.version,
        "prompts": found.to_json(),
        "samples": conversations(ctx, found.prompts),
    }


def freeze_prompts(ctx: JobContext, grpo: GrpoSettings) -> Frozen:
    """Reads every source once: one that is not there, or holds nothing, is told before anything is trained."""
    ctx.check()
    captured: dict[str, list[str]] = {}

    def newest(source: PromptSource) -> list[Completion]:
        found = list(_fresh(ctx, source.count or DEFAULT_COUNT))
        captured[str(grpo.prompts.index(source))] = [one.id for one in found]
        return found

    found = read_prompts(grpo.prompts, newest)
    for one in found:
        if one.bad:
            ctx.note(f"prompts of {one.source.source}: {len(one.bad)} bad rows were left out", first=str(one.bad[0]))
    counts = {f"{number}:{one.source.source}": len(one.prompts) for number, one in enumerate(found)}
    return Frozen(_hash(found), counts, captured, found)


def thaw_prompts(ctx: JobContext, grpo: GrpoSettings, frozen: Mapping[str, Any]) -> tuple[SourcePrompts, ...]:
    """The same prompts in a later attempt, less the conversations that users have deleted.

    Raises Conflict (code `prompts_changed`) where a file's are others now, TrainingError where a source has none left.
    """
    gone = 0

    def kept(source: PromptSource) -> Iterator[Completion]:
        nonlocal gone
        for id_ in frozen["captured"][str(grpo.prompts.index(source))]:
            try:
                yield ctx.store.get_completion(id_)
            except NotFound:
                gone += 1

    try:
        found = read_prompts(grpo.prompts, kept)
    finally:
        if gone:
            ctx.note(f"{gone} of the job's prompts were deleted since", gone=gone)
    changed = [
        one.source.source
        for one, before in zip(found, frozen["sources"], strict=True)
        if one.sha256 != before and not (gone and one.source.source == CAPTURED)
    ]
    if changed:
        raise Conflict(
            f"the prompts are not those that the job began with: {', '.join(changed)} changed since; start a new job",
            code="prompts_changed",
        )
    return found


def train(ctx: JobContext) -> Json:
    """Stage `train` of a job of method `grpo`: leaves `adapter/`; goes on from `train/checkpoints/`."""
    from train.methods.grpo.method import GrpoRun, train_grpo
    from train.pipeline.learn import LEARNT, report_modules
    from train.pipeline.prepare import parent_of, snapshot_file

    parent, grpo = parent_of(ctx), ctx.train.grpo
    remove(ctx.folder / "adapter")
    (ctx.folder / "train").mkdir(parents=True, exist_ok=True)
    run = GrpoRun(
        master=parent.master,
        adapters=parent.adapters,
        folder=ctx.folder / "train",
        out=ctx.folder / "adapter",
        version=parent.version,
        prefix=_prefix(ctx),
        grpo=grpo,
        policies=ctx.train.policies(),
        prompts=thaw_prompts(ctx, grpo, snapshot_file(ctx)["prompts"]),
        base=ctx.train.base,
        serving=parent.serving,
    )
    heard = (lambda step: _tell(ctx, step), lambda applied: report_modules(ctx, applied))
    with _lent(ctx, grpo, ctx.train.reward, run.folder, *heard) as means:
        report = train_grpo(run, means)
    told = asdict(report)
    ctx.metrics({key: told[key] for key in (*LEARNT, "sampling_s", "waits") if key in told})
    return told


def require_adapters(recipe: Recipe, parent: str, live: str | None) -> None:
    """Raises Conflict for a recipe whose `grpo` stages cannot sample their policy from the live engine.

    The engine holds the live version and an adapter of its language model, nothing else.
    """
    for at, stage in enumerate(recipe.stages):
        if stage.kind != "grpo":
            continue
        if parent != live:
            raise Conflict(
                f"stage {stage.name!r} samples from the live engine, which serves {live}; recipe {recipe.name!r} "
                f"starts from {parent}: roll that out first, or leave `model` out",
                code="base_not_live",
            )
        for earlier in recipe.stages[:at]:
            for module, policy in earlier.policies.items():
                if policy.trains and (module != "language_model" or policy.policy != "lora"):
                    raise Conflict(
                        f"stage {earlier.name!r} trains the {module} ({policy.policy}), which no adapter beside the "
                        f"live version can hold, and stage {stage.name!r} samples from one: roll that training out "
                        "first, and run GRPO on it",
                        code="not_an_adapter",
                    )


def settings_of(ctx: JobContext, stage: RecipeStage) -> GrpoSettings:
    """A recipe's stage in the method's words; where the engine is, and how long it is waited for, ours may say."""
    grpo, ours = stage.grpo or GrpoSettings(), ctx.train.grpo
    said = grpo.model_fields_set
    update = {key: getattr(ours, key) for key in ("servers", "wait_s") if key not in said}
    return grpo.model_copy(update=update)


def rewards_of(ctx: JobContext, stage: RecipeStage) -> RewardSettings:
    """The stage's rewards, or ours. Raises SettingsError where neither names one."""
    found = stage.reward or ctx.train.reward
    if not found.rewards:
        key = f"stages.{stage.name}.reward.rewards"
        raise SettingsError(f"{key} is empty, and train.reward.rewards too: GRPO needs at least one reward", param=key)
    return found


def train_stage(ctx: JobContext, run: StageRun, parent: Parent, frozen: Mapping[str, Any], listener: Listener) -> Json:
    """A recipe's stage; `frozen` is what `freeze_prompts` told of it. Returns its report."""
    from train.methods.grpo.method import GrpoRun, train_grpo
    from train.methods.policy_model import Base
    from train.stages.run import summary
    from train.stages.spec import DELTA, LOG, read_steps

    started, stage = time.monotonic(), run.stage
    grpo = settings_of(ctx, stage)
    own = GrpoRun(
        master=run.master,
        adapters=parent.adapters,
        earlier=run.deltas[len(parent.adapters) :],
        folder=run.folder,
        out=run.folder / DELTA,
        version=parent.version,
        prefix=f"{_prefix(ctx)}-{stage.name}",
        grpo=grpo,
        policies=stage.policies,
        prompts=thaw_prompts(ctx, grpo, frozen),
        base=cast(Base, run.base),
        serving=run.serving,
    )
    heard = (listener.on_step, lambda applied: listener.on_table(applied.table()))
    with _lent(ctx, grpo, rewards_of(ctx, stage), run.folder, *heard) as means:
        report = train_grpo(own, means)
    return {
        **summary(read_steps(run.folder / LOG)),
        "name": stage.name,
        "kind": stage.kind,
        "settings": stage.model_dump(mode="json", exclude={"name", "kind"}, exclude_defaults=True),
        "modules": {row.module: asdict(row) | stage.policies[row.module].record() for row in report.modules},
        "trainable_parameters": report.trainable_parameters,
        "data": {"sha256": frozen["sha256"], "sources": list(report.sources)},
        "dtype": report.dtype,
        "frozen": report.frozen,
        "seconds": round(time.monotonic() - started, 1),
        "task": {key: getattr(report, key) for key in ("prompts", "answers", "reward_first", "reward_last", "counts")},
    }


def conversations(ctx: JobContext, prompts: Sequence[SourcePrompts]) -> Json:
    """References for calibration and verification: a prompt with its right answer is one that the policy may learn."""
    from train.pipeline.prepare import recent
    from train.stages.job import spread_rows

    counts = (ctx.train.quantize.calibration_samples, ctx.train.verify.samples)
    wanted = sum(counts)
    rows = spread_rows(answered(prompts), counts)
    others, unreadable = calibration.usable(recent(ctx, wanted))
    aside = [calibration.of_completion(one) for one in others if _is_held_out(ctx, one)]
    found = [*rows, *(calibration.of_completion(one) for one in others if not _is_held_out(ctx, one))]
    checked = [*aside, *found[counts[0] :]][: counts[1]]
    return {
        "recipe": RECIPE,
        "calibration": found[: counts[0]],
        "verification": checked or found[: counts[1]],
        "verified_on_calibration": not checked,
        "unreadable": unreadable,
    }


def answered(prompts: Sequence[SourcePrompts]) -> list[Sample]:
    """Prompts with a right answer, as conversations."""
    return [
        Sample((*one.messages, {"role": "assistant", "content": one.answers[0]}), one.images, one.source)
        for source in prompts
        for one in source.prompts
        if one.answers
    ]


def _fresh(ctx: JobContext, count: int) -> Iterator[Completion]:
    """The newest conversations of differing prompts, held-out ones left out."""
    seen: set[str] = set()
    for one in ctx.store.recent_completions(2 * count):
        if one.prompt_hash in seen or _is_held_out(ctx, one):
            continue
        seen.add(one.prompt_hash)
        yield one
        if len(seen) == count:
            return


def _is_held_out(ctx: JobContext, one: Completion) -> bool:
    return snapshot.is_held_out(one.prompt_hash, ctx.train.held_out)


def _hash(prompts: Sequence[SourcePrompts]) -> str:
    told = json.dumps([[one.sha256, one.source.weight] for one in prompts])
    return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"


def _prefix(ctx: JobContext) -> str:
    return f"{ctx.job.id}-a{ctx.job.attempt}"


@contextmanager
def _lent(
    ctx: JobContext,
    grpo: GrpoSettings,
    rewards: RewardSettings,
    folder: Path,
    on_step: Callable[[Step], None],
    on_ready: Callable[[Applied], None],
) -> Iterator[Means]:
    """What a training needs of the job; its connections are closed after. `folder` is the training's own."""
    from noria.sampling import SamplingPool
    from train.methods.grpo.method import Means

    key = key_of(grpo.servers, ctx.settings)

    def pool(found: Sequence[str]) -> SamplingPool:
        trust = ctx.settings.trust
        return SamplingPool(found, api_key=key, concurrency=grpo.concurrency, give_up_s=GIVE_UP_S, trust=trust)

    with Servers(addresses(grpo.servers, ctx.settings, ctx.store), pool) as servers:
        yield Means(
            sampler=servers,
            score=lambda applied, processor: _scorer(ctx, rewards, folder, applied, processor),
            images=ctx.data_images,
            on_step=on_step,
            check=ctx.check,
            on_ready=on_ready,
            tell=ctx.note,
        )


def _scorer(ctx: JobContext, rewards: RewardSettings, folder: Path, applied: Applied, processor: Any) -> Scorer:
    from train.rewards import Backing, scorer_of

    def pairs() -> tuple[Sequence[Pair], Sequence[Pair]]:
        chosen = snapshot.select(ctx.store.training_pairs(), held_out=ctx.train.held_out)
        ctx.store.note_uses(ctx.job.id, {"reward": [pair.preference_id for pair in chosen.train]})
        return chosen.train, chosen.held_out

    backing = Backing(
        processor=lambda: processor,
        model=lambda: applied.model,
        frozen=applied.reference,
        load_image=ctx.data_images,
        pairs=pairs,
        folder=folder,  # a stage's own: what an earlier stage's features taught is no reward of this one's
        check=ctx.check,
    )
    return scorer_of(rewards, backing)


def _tell(ctx: JobContext, step: Step) -> None:
    line = asdict(step)
    told = {**{key: line[key] for key in line if key != "metrics"}, **step.metrics}
    ctx.store.add_event(ctx.job.id, "metrics", told)
    shown = {key: step.metrics[key] for key in ("reward", "kl", "divergence") if key in step.metrics}
    ctx.log.event("step", job_id=ctx.job.id, step=step.step, steps=step.steps, loss=step.loss, **shown)
    ctx.progress("train", step.step / max(1, step.steps))
