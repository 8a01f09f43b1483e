"""Jobs of method `recipe`: what the pipeline's stages `snapshot` and `train` do for them; the others are the same.

Comes in: a job in its context, with its recipe. Goes out: `snapshot.json` (the data's hashes, which conversations
calibrate and verify), `train/01-NAME/` for each stage, and `adapter/01-NAME/`, the deltas in order.
A stage whose report is there is done; one that was cut off goes on from its last checkpoint. Must not import `serve`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from noria.errors import Conflict, NotFound, SettingsError
from noria.methods.table import LABELLED_KINDS, METHODS, PREFERENCE_KINDS
from noria.recipes import Recipe, RecipeStage
from noria.records import Json
from noria.registry import Registry
from train.data import calibration
from train.data.formats.pictures import into
from train.data.samples import AnySample, PreferenceSample, Sample, ThumbSample, VisionSample
from train.data.sources import read_all
from train.models.embedded import BLANK
from train.pipeline.context import REPORT_EVERY_S, JobContext
from train.pipeline.files import link_tree, once, remove
from train.pipeline.lineage import find_parent, live_version, require_disk
from train.pipeline.prepare import parent_of, recent, snapshot_file
from train.stages.spec import CHECKPOINTS, DELTA, StageRun, Step, base_of, precision_conflict

if TYPE_CHECKING:
    from train.stages.run import Listener

RECIPE = "rows of the recipe's last stage with answers, evenly spread, half of them plain text, then recent completions"
ADD = "add it with `noria model add`"
Answered = Sample | PreferenceSample | ThumbSample
_RECENT_STEPS = 20  # over which the time left is reckoned


def recipe_of(ctx: JobContext) -> Recipe:
    """The job's recipe. Raises SettingsError when it has none."""
    if ctx.recipe is None:
        raise SettingsError(f"job {ctx.job.id} is of method {ctx.job.method!r} and has no recipe", param="recipe")
    return ctx.recipe


def freeze(ctx: JobContext) -> Json:
    """Reads every stage's data once: a source that is not there, or holds nothing, is told before anything is trained.

    Raises Conflict, NotFound, TrainingError as the lineage and the sources do.
    """
    recipe = recipe_of(ctx)
    parent = find_parent(ctx.registry, ctx.settings.home, version_of(recipe, ctx.registry))
    _require_base(ctx, recipe)
    if any(stage.kind == "grpo" for stage in recipe.stages):
        from train.methods.grpo.job import require_adapters

        require_adapters(recipe, parent.version, ctx.registry.live())
    require_disk(sum(path.stat().st_size for path in parent.master.glob("*.safetensors")), ctx.settings.jobs_dir)
    hashes: dict[str, str] = {}
    counts: dict[str, int] = {}
    prompts: dict[str, Json] = {}
    answered: Sequence[AnySample] = ()
    for stage in recipe.stages:
        ctx.check()
        if stage.kind == "grpo":
            from train.methods.grpo import job as grpo

            grpo.rewards_of(ctx, stage)
            asked = grpo.freeze_prompts(ctx, grpo.settings_of(ctx, stage))
            hashes[stage.name], counts[stage.name] = asked.sha256, sum(asked.counts.values())
            prompts[stage.name] = asked.to_json()
            answered = grpo.answered(asked.prompts) or answered
            continue
        data = read_all(stage.data, stage.kind, keep_image=into(ctx.blobs), seed=stage.seed)
        hashes[stage.name], counts[stage.name] = data.sha256, len(data)
        _tell_bad(ctx, stage, [row for report in data.reports for row in report.bad])
        answered = answered if stage.kind in LABELLED_KINDS else data
    content = json.dumps({"recipe": recipe.model_dump(mode="json"), "data": hashes}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return {
        "train": [],
        "held_out": [],
        "left_out": [],
        "counts": counts,
        "data": hashes,
        "prompts": prompts,
        "id": f"data_{digest[:24]}",
        "sha256": f"sha256:{digest}",
        "parent": parent.version,
        "samples": _conversations(ctx, answered),
    }


def version_of(recipe: Recipe, registry: Registry) -> str:
    """The version that the recipe starts from: the live one, one by its id, or the oldest of a model's name.

    Raises Conflict when nothing is live, NotFound for an unknown name.
    """
    if recipe.model is None:
        return live_version(registry)
    versions = [record.id for record in registry.list_versions()]
    if recipe.model in versions:
        return recipe.model
    manifests = {version: registry.manifest(version) for version in versions}
    named = [v for v, found in manifests.items() if found.base is not None and found.base.name == recipe.model]
    roots = [version for version in named if manifests[version].parent is None]
    if not roots:
        known = sorted({found.base.name for found in manifests.values() if found.base is not None})
        advice = "`noria model build-embedded` makes it and trains it" if recipe.model == BLANK else ADD
        raise NotFound(
            f"model {recipe.model!r} of recipe {recipe.name!r} is no version and no model that was added "
            f"({', '.join([*versions, *known]) or 'there is none'}); {advice}",
            param="model",
        )
    return roots[-1]


def train(ctx: JobContext) -> Json:
    """Runs the stages that are not done, in order, and puts their deltas together."""
    recipe = recipe_of(ctx)
    parent = parent_of(ctx)
    deltas = list(parent.adapters)
    reports = []
    for index in range(len(recipe.stages)):
        run = StageRun(
            master=parent.master,
            deltas=tuple(deltas),
            stage=recipe.stages[index],
            folder=ctx.folder / "train" / recipe.folder_of(index),
            blobs=ctx.settings.blobs_url,
            processes=ctx.train.processes,
            accelerate_config=ctx.train.accelerate_config,
            base=ctx.train.base,
            serving=parent.serving,
        )
        reports.append(_stage(ctx, run, index, len(recipe.stages)))
        deltas.append(run.folder / DELTA)
    _gather(ctx, recipe)
    told = {
        "steps": sum(one["steps"] for one in reports),
        "loss_first": reports[-1]["loss_first"],
        "loss_last": reports[-1]["loss_last"],
    }
    ctx.metrics(told)
    return {**told, "dtype": reports[-1]["dtype"], "recipe": recipe.model_dump(mode="json"), "stages": reports}


def run_stage(run: StageRun, listener: Listener) -> Json:
    """One stage, in this process or in several. Returns its report."""
    if run.stage.kind in PREFERENCE_KINDS:
        from train.stages.preferences import train_preferences

        return train_preferences(run, listener)
    from train.stages.run import measure_data, read_data, train_supervised

    if run.processes == 1 and run.accelerate_config is None:
        return train_supervised(run, listener)
    from train.methods.policy_model import load_processor
    from train.stages.processes import train_in_processes

    measure_data(run, load_processor(run.master), read_data(run), listener)  # once, not in every process
    return train_in_processes(run, listener)


def _stage(ctx: JobContext, run: StageRun, index: int, count: int) -> Json:
    from train.stages.run import Listener

    run.folder.mkdir(parents=True, exist_ok=True)
    teller = _Teller(ctx, run, index, count)
    listener = Listener(teller.step, teller.table, teller.measured, ctx.check)

    def produce() -> Json:
        alone = run.stage.kind in METHODS and run.processes > 1
        ctx.note(f"stage {run.folder.name} ({run.stage.kind}) begins" + (", in one process" if alone else ""))
        if run.stage.kind == "grpo":
            from train.methods.grpo.job import train_stage

            return train_stage(ctx, run, parent_of(ctx), snapshot_file(ctx)["prompts"][run.stage.name], listener)
        return run_stage(run, listener)

    report = once(run.folder / "report.json", produce)
    remove(run.folder / CHECKPOINTS)
    return report


class _Teller:
    """Tells of one stage: the progress bar, the log and, now and then, the job's history."""

    def __init__(self, ctx: JobContext, run: StageRun, index: int, count: int) -> None:
        self._ctx = ctx
        self._run = run
        self._index = index
        self._count = count
        self._told_at = 0.0
        self._lately: list[Step] = []

    def step(self, step: Step) -> None:
        """One optimiser step."""
        self._lately = [*self._lately, step][-_RECENT_STEPS:]
        spent = sum(one.seconds for one in self._lately)
        speed = sum(one.tokens for one in self._lately) / spent if spent else 0.0
        left_s = (step.steps - step.step) * spent / len(self._lately)
        unit = "pictures" if self._run.stage.kind in LABELLED_KINDS else "tokens"
        words = [f"{self._run.folder.name} {step.step}/{step.steps}", f"loss {step.loss:.4f}"]
        words += [f"{speed:.0f} {unit}/s"] if speed else []
        words.append(f"{int(left_s) // 60}:{int(left_s) % 60:02d} left")
        self._share(step.step / step.steps, "  ".join(words))
        now = time.monotonic()
        if step.step == step.steps or now - self._told_at >= REPORT_EVERY_S:
            self._told_at = now
            keys = {"train_stage": self._run.folder.name, "step": step.step, "steps": step.steps, "loss": step.loss}
            more = {"learning_rate": step.learning_rate, f"{unit}_per_s": round(speed, 1), "left_s": round(left_s, 1)}
            self._ctx.store.add_event(self._ctx.job.id, "metrics", {**keys, **more, **step.metrics})
            if not self._ctx.log.terminal:
                self._ctx.log.event("step", job_id=self._ctx.job.id, **keys, **more)

    def table(self, table: str) -> None:
        """Who trains: into the job's history, the log and, as it stands, into `modules.txt`."""
        (self._run.folder / "modules.txt").write_text(table + "\n")
        self._ctx.note("modules:\n" + table, train_stage=self._run.folder.name)

    def measured(self, share: float) -> None:
        """How much of the data was looked at."""
        self._share(0.0, f"{self._run.folder.name} reading data {100 * share:.0f} %")

    def _share(self, share: float, words: str) -> None:
        self._ctx.progress("train", (self._index + share) / self._count, words)


def _gather(ctx: JobContext, recipe: Recipe) -> None:
    """`adapter/`, whole or not at all."""
    beside = ctx.folder / "adapter.tmp"
    remove(beside)
    for index in range(len(recipe.stages)):
        name = recipe.folder_of(index)
        link_tree(ctx.folder / "train" / name / DELTA, beside / name)
    remove(ctx.folder / "adapter")
    beside.rename(ctx.folder / "adapter")


def _conversations(ctx: JobContext, answered: Sequence[AnySample]) -> Json:
    """References for calibration and verification, no row in both where there are enough."""
    counts = (ctx.train.quantize.calibration_samples, ctx.train.verify.samples)
    wanted = sum(counts)
    rows = spread_rows(_good(answered), counts)
    others, unreadable = calibration.usable(recent(ctx, wanted))
    found = [*rows, *map(calibration.of_completion, others)]
    checked = found[counts[0] :][: counts[1]]
    return {
        "recipe": RECIPE,
        "calibration": found[: counts[0]],
        "verification": checked or found[: counts[1]],
        "verified_on_calibration": not checked,
        "unreadable": unreadable,
    }


def spread_rows(answered: Sequence[AnySample], counts: tuple[int, int]) -> list[Json]:
    """References (`train.data.calibration`): those to calibrate on, then those to verify on, both spread over all rows.

    Sources lie one after the other: a first part to calibrate on would hold nothing of the last ones. Where some rows
    show pictures and some do not, half is without: what serves answers both, and GPTQ rounds for what it was shown.
    """
    wanted, checked = sum(counts), counts[1]
    named = [one for one in answered if not isinstance(one, VisionSample)]
    plain, pictured = [one for one in named if not one.images], [one for one in named if one.images]
    without = min(len(plain), max(wanted // 2, wanted - len(pictured)))
    taken = list(enumerate([*_spread(pictured, wanted - without), *_spread(plain, without)]))
    aside = {number * wanted // checked + wanted // checked - 1 for number in range(checked)}
    ordered = [one for at, one in taken if at not in aside] + [one for at, one in taken if at in aside]
    return [_reference(one) for one in ordered]


def _good(answered: Sequence[AnySample]) -> Sequence[AnySample]:
    """Without the answers that have a thumb down: a stage `kto` has some, and no other stage."""
    if not answered or not isinstance(answered[0], ThumbSample):
        return answered
    return [one for one in answered if isinstance(one, ThumbSample) and one.up]


def _spread(rows: Sequence[Answered], wanted: int) -> Sequence[Answered]:
    step = max(1, len(rows) // max(1, wanted))
    return rows[: step * wanted : step]


def _reference(one: Answered) -> Json:
    if isinstance(one, Sample):
        return {"row": one.source, "messages": list(one.messages), "cut": one.cut}
    said, cut = (one.chosen, one.chosen_cut) if isinstance(one, PreferenceSample) else (one.answer, one.cut)
    return {"row": one.source, "messages": [*one.messages, {"role": "assistant", "content": said}], "cut": cut}


def _require_base(ctx: JobContext, recipe: Recipe) -> None:
    """Raises Conflict for a 4-bit base that cannot be what the recipe trains on, or a precision that nothing obeys."""
    for stage in recipe.stages:
        if because := precision_conflict(stage, base_of(stage, ctx.train.base), ctx.train.accelerate_config):
            raise Conflict(because, param="precision")
    if ctx.train.base == "master":
        return
    for stage in recipe.stages:
        if stage.policies["language_model"].policy == "full":
            key = f"stages.{stage.name}.modules.language_model.policy='full'"
            raise Conflict(f"{key} contradicts train.base={ctx.train.base!r}: 4-bit weights cannot be trained in full")
    if ctx.train.base == "gptq" and len(recipe.stages) > 1:
        raise Conflict(
            f"train.base='gptq' is the parent's own checkpoint, which holds nothing of an earlier stage: recipe "
            f"{recipe.name!r} has {len(recipe.stages)} stages; use train.base='master' or 'bitsandbytes'"
        )


def _tell_bad(ctx: JobContext, stage: RecipeStage, bad: Sequence[object]) -> None:
    for row in bad[:10]:
        ctx.log.event("bad_row", job_id=ctx.job.id, train_stage=stage.name, row=str(row))
    if bad:
        ctx.note(f"stage {stage.name}: {len(bad)} bad rows were left out", first=str(bad[0]))
