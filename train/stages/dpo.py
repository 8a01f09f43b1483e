"""Stage `dpo` of a recipe: direct preference optimisation from preference files, as the daemon does from its store.

Comes in: a `StageRun` whose data are preferences. Goes out: a delta, a log, a report, as of any other stage; an attempt
that was cut off goes on from its last checkpoint. Must not import `serve`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import cast

import torch

from noria.errors import TrainingError
from noria.recipes import RecipeStage
from noria.records import Json, Pair
from noria.settings import DpoSettings
from train.data.pairs import PairRenderer, TextPair
from train.data.render import ChatRenderer
from train.data.samples import PreferenceSample
from train.methods import dpo as method
from train.methods.dpo_trainer import Step as DpoStep
from train.methods.policy_model import Base, load_processor
from train.stages.run import Listener, StageLog, data_report, image_loader, read_data, summary
from train.stages.spec import CHECKPOINTS, DELTA, StageRun, Step
from train.stages.trainer import rates

BETA = 0.1


def train_preferences(run: StageRun, listener: Listener) -> Json:
    """Runs the stage in this process and returns its report. Raises TrainingError, as `train_dpo`."""
    started = time.monotonic()
    stage = run.stage
    data = read_data(run)
    load_image = image_loader(run)
    renderer = PairRenderer(ChatRenderer(load_processor(run.master)), load_image)
    pairs, left_out = _pairs(run, cast("list[PreferenceSample]", data), renderer, listener)
    steps, count = _Steps(run, listener), step_count(stage, len(pairs))
    told = method.train_dpo(
        run.master,
        run.deltas,
        pairs,
        load_image,
        run.folder / DELTA,
        settings(run),
        stage.policies,
        on_step=steps.add,
        check=listener.check,
        on_ready=lambda applied: listener.on_table(applied.table()),
        base=cast(Base, run.base),
        serving=run.serving,
        dtype=getattr(torch, run.dtype) if run.dtype else None,
        more={"max_steps": count, **rates(stage, count)},
        checkpoints=run.folder / CHECKPOINTS,
        checkpoint_every=stage.checkpoint_every,
    )
    return {
        **summary(steps.log.steps),
        "name": stage.name,
        "kind": stage.kind,
        "settings": stage.model_dump(mode="json", exclude={"name", "kind"}, exclude_defaults=True),
        "modules": {row.module: asdict(row) | stage.policies[row.module].record() for row in told.modules},
        "trainable_parameters": told.trainable_parameters,
        "data": data_report(data),
        "dtype": told.dtype,
        "frozen": told.frozen,
        "seconds": round(time.monotonic() - started, 1),
        "task": {"pairs": told.pairs, **left_out, "margin_last": told.margin_last},
    }


def step_count(stage: RecipeStage, pairs: int) -> int:
    """Optimiser steps of the stage; the last one of a pass over the pairs may have fewer than `batch_size`."""
    return stage.steps or math.ceil((stage.epochs or 1.0) * math.ceil(pairs / stage.batch_size))


def settings(run: StageRun) -> DpoSettings:
    """The recipe's stage in the method's words; its length and its rates are `step_count` and `rates`."""
    stage = run.stage
    return DpoSettings(
        beta=stage.beta or BETA,
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro,
        max_grad_norm=stage.max_grad_norm,
        max_length=stage.max_length,
        seed=stage.seed,
    )


def _pairs(
    run: StageRun, samples: list[PreferenceSample], renderer: PairRenderer, listener: Listener
) -> tuple[list[TextPair], dict[str, int]]:
    """The pairs that fit, rendered, and how many do not, by the snapshot's reasons."""
    kept: list[TextPair] = []
    left_out = {"unreadable": 0, "too_long": 0}
    for number in range(len(samples)):
        listener.check()
        listener.on_measured((number + 1) / len(samples))
        pair = _record(samples[number])
        if not renderer.is_readable(pair):
            left_out["unreadable"] += 1
        elif renderer.tokens(pair) > run.stage.max_length:
            left_out["too_long"] += 1
        else:
            kept.append(renderer.render(pair))
    if not kept:
        raise TrainingError(
            f"stage {run.stage.name!r}: none of {len(samples)} pairs can be used: {left_out['too_long']} do not fit "
            f"max_length={run.stage.max_length}, {left_out['unreadable']} spell a picture's placeholder",
            code="no_data",
        )
    return kept, left_out


def _record(one: PreferenceSample) -> Pair:
    """The sample as the store's pairs look; its place in the file stands for an id."""
    return Pair(
        preference_id=one.source,
        prompt_hash=one.source,
        messages=one.messages,
        chosen=one.chosen,
        rejected=one.rejected,
        created_at=0.0,
        images=one.images,
        chosen_cut=one.chosen_cut,
        rejected_cut=one.rejected_cut,
    )


class _Steps:
    """The method's steps in a stage's words, written to the log and told."""

    def __init__(self, run: StageRun, listener: Listener) -> None:
        self.log = StageLog(run)
        self._listener = listener
        self._at = time.monotonic()

    def add(self, step: DpoStep) -> None:
        now = time.monotonic()
        figures = {name: getattr(step, name) for name in ("margin", "accuracy", "reward_chosen", "reward_rejected")}
        seconds, self._at = round(now - self._at, 4), now
        made = Step(
            step=step.step,
            steps=step.steps,
            loss=step.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            tokens=0,
            seconds=seconds,
            metrics=figures,
        )
        self.log.add(made)
        self._listener.on_step(made)
