"""Stages `dpo`, `simpo`, `orpo`, `cpo`, `mpo` and `kto` of a recipe: a preference method from files, as the daemon has
it from its store.

Comes in: a `StageRun` whose data are preferences, or answers with a verdict. Goes out: a delta, a log, a report, as of
any other stage; an attempt that was cut off goes on from its last checkpoint. Must not import `serve`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch

from noria.errors import TrainingError
from noria.methods.preferences import SETTINGS, PreferenceSettings
from noria.methods.table import PreferenceMethod
from noria.recipes import RecipeStage
from noria.records import Json, Pair, Thumb
from train.data.pairs import PairRenderer, Renderer, Text, TextPair, TextThumb, ThumbRenderer
from train.data.render import ChatRenderer
from train.data.samples import LoadImage, PreferenceSample, ThumbSample
from train.data.snapshot import Judged
from train.methods.policy_model import Base, load_processor
from train.methods.preferences import method
from train.methods.preferences.steps import Step as MethodStep
from train.stages.run import Listener, StageLog, data_report, image_loader, read_data, summary
from train.stages.spec import CHECKPOINTS, DELTA, StageRun, Step
from train.stages.trainer import rates

FIGURES = ("margin", "accuracy", "reward_chosen", "reward_rejected", "kl")


def train_preferences(run: StageRun, listener: Listener) -> Json:
    """Runs the stage in this process and returns its report. Raises TrainingError, as `train_method`."""
    started = time.monotonic()
    stage = run.stage
    data = read_data(run)
    load_image = image_loader(run)
    judgements, left_out = _judgements(run, data, load_image, listener)
    steps, count = _Steps(run, listener), step_count(stage, len(judgements))
    told = method.train_method(
        run.master,
        run.deltas,
        judgements,
        load_image,
        run.folder / DELTA,
        settings(stage),
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
        "task": {**told.learnt_from, **left_out, "margin_last": told.margin_last},
    }


def step_count(stage: RecipeStage, rows: int) -> int:
    """Optimiser steps of the stage; the last one of a pass over pairs may have fewer than `batch_size`."""
    return stage.steps or math.ceil((stage.epochs or 1.0) * math.ceil(rows / stage.batch_size))


def settings(stage: RecipeStage) -> PreferenceSettings:
    """The recipe's stage in the method's words; its length and its rates are `step_count` and `rates`."""
    return SETTINGS[cast(PreferenceMethod, stage.kind)].model_validate(
        {
            **stage.loss.model_dump(),
            "batch_size": stage.batch_size,
            "micro_batch_size": stage.micro,
            "max_grad_norm": stage.max_grad_norm,
            "max_length": stage.max_length,
            "seed": stage.seed,
        }
    )


def _judgements(
    run: StageRun, samples: Sequence[Any], load_image: LoadImage, listener: Listener
) -> tuple[list[TextPair] | list[TextThumb], dict[str, int]]:
    """What fits, rendered, and how much does not, by the snapshot's reasons."""
    chat = ChatRenderer(load_processor(run.master))
    if run.stage.kind == "kto":
        thumbs = ThumbRenderer(chat, load_image)
        rows = (_thumb(cast(ThumbSample, samples[number])) for number in range(len(samples)))
        answers = _fitting(run, rows, len(samples), thumbs, listener)
        _require_both_kinds(run.stage.name, answers[0])
        return answers
    pairs = PairRenderer(chat, load_image)
    made = (_pair(cast(PreferenceSample, samples[number])) for number in range(len(samples)))
    return _fitting(run, made, len(samples), pairs, listener)


def _fitting(
    run: StageRun, rows: Iterator[Judged], count: int, renderer: Renderer[Judged, Text], listener: Listener
) -> tuple[list[Text], dict[str, int]]:
    kept: list[Text] = []
    left_out = {"unreadable": 0, "too_long": 0}
    for number, row in enumerate(rows, start=1):
        listener.check()
        listener.on_measured(number / count)
        if not renderer.is_readable(row):
            left_out["unreadable"] += 1
        elif renderer.tokens(row) > run.stage.max_length:
            left_out["too_long"] += 1
        else:
            kept.append(renderer.render(row))
    if not kept:
        raise TrainingError(
            f"stage {run.stage.name!r}: none of {count} {'answers' if run.stage.kind == 'kto' else 'pairs'} can be "
            f"used: {left_out['too_long']} do not fit max_length={run.stage.max_length}, {left_out['unreadable']} "
            "spell a picture's placeholder",
            code="no_data",
        )
    return kept, left_out


def _require_both_kinds(name: str, answers: Sequence[TextThumb]) -> None:
    """As the snapshot of a job does. Raises TrainingError."""
    if len({one.up for one in answers}) < 2:
        raise TrainingError(
            f"stage {name!r}: all {len(answers)} answers that fit are {'good' if answers[0].up else 'bad'}: there is "
            "nothing to tell apart; add rows with the other verdict to its data",
            code="one_sided",
        )


def _pair(one: PreferenceSample) -> Pair:
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


def _thumb(one: ThumbSample) -> Thumb:
    """The sample as the store's thumbs look."""
    return Thumb(
        feedback_id=one.source,
        prompt_hash=one.source,
        messages=one.messages,
        answer=one.answer,
        up=one.up,
        created_at=0.0,
        images=one.images,
        cut=one.cut,
    )


class _Steps:
    """The method's steps in a stage's words, written to the log and told."""

    def __init__(self, run: StageRun, listener: Listener) -> None:
        self.log = StageLog(run)
        self._listener = listener
        self._at = time.monotonic()

    def add(self, step: MethodStep) -> None:
        now = time.monotonic()
        told = step.to_json()
        seconds, self._at = round(now - self._at, 4), now
        made = Step(
            step=step.step,
            steps=step.steps,
            loss=step.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            tokens=step.tokens,
            seconds=seconds,
            metrics={name: told[name] for name in FIGURES if name in told},
        )
        self.log.add(made)
        self._listener.on_step(made)
