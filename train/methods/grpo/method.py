"""GRPO over groups that the serving engine samples (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

Comes in: a master checkpoint, deltas, prompts, a sampler, a scorer, who trains. Goes out: a delta folder, a report;
checkpoints while it lasts. What trains is a LoRA of the language model; tower and aligner are frozen, and proven so.

Per answer o_i of a group, with r_i its reward and A_i = (r_i - mean r) / (std r + 1e-4) for each of its tokens, eq. 3
and 4 of the paper: -(min(ratio A, clip(ratio, 1 - e_low, 1 + e_high) A) - beta KL) of each token; how these are
averaged is the loss type's. Must not import `serve`.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from trl import GRPOConfig

from noria.errors import SettingsError, TrainingError
from noria.methods.grpo import GrpoSettings, policy_conflict
from noria.module_settings import ResolvedPolicy
from noria.records import Json, Module
from train.data.render import ChatRenderer
from train.data.sources import ImageLoader
from train.methods.checkpoints import last_checkpoint, step_of
from train.methods.delta import save_delta
from train.methods.grpo.sampling.batches import Batches
from train.methods.grpo.sampling.feed import SampledFeed
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.pictures import ModelPictures, WirePictures
from train.methods.grpo.sampling.policy import Policy, earlier_factors
from train.methods.grpo.sampling.prompts import SourcePrompts, Stream
from train.methods.grpo.sampling.protocol import Sampler
from train.methods.grpo.trainer import GroupTrainer
from train.methods.policies import Applied, Row, apply_policies
from train.methods.policy_model import Base, load_policy, load_processor, read_architecture, training_dtype
from train.rewards import Scorer
from train.stages.spec import LOG, Step, append_step, read_steps, write_steps
from train.stages.trainer import StageWatch

CHECKPOINTS, ADAPTER = "checkpoints", "policy"


@dataclass(frozen=True)
class GrpoRun:
    """One training. `adapters` are the lineage's deltas, `earlier` those of the job's stages before this one, which the
    engine's `version` does not hold; `folder` is the training's own. `prefix` begins the adapters' names."""

    master: Path
    adapters: Sequence[Path]
    folder: Path
    out: Path
    version: str
    prefix: str
    grpo: GrpoSettings
    policies: Mapping[Module, ResolvedPolicy]
    prompts: Sequence[SourcePrompts]
    earlier: Sequence[Path] = ()
    base: Base = "master"
    serving: Path | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Means:
    """What a training is lent: who samples and scores, where its prompts' pictures are read, and who hears of it.

    `score` gets the model with its policies applied and its processor, for rewards that read them; its scorer is closed
    here. `check` is called between micro-batches and while waiting, and may raise to stop.
    """

    sampler: Sampler
    score: Callable[[Applied, Any], Scorer]
    images: ImageLoader
    on_step: Callable[[Step], None]
    check: Callable[[], None]
    on_ready: Callable[[Applied], None] = lambda applied: None
    tell: Callable[[str], None] = lambda words: None


@dataclass(frozen=True)
class GrpoReport:
    """What a training did. `reward_first` and `reward_last` are means over the first and last tenth of the updates for
    which answers were scored.

    `counts` says what became of every group, `rewards` of each reward's samples; `rewards` and `waits` are of the last
    attempt. `frozen` are hashes of the frozen modules' tensors in memory, the same before and after; `modules` is the
    table of who trained.
    """

    steps: int
    prompts: int
    answers: int
    loss_first: float
    loss_last: float
    reward_first: float
    reward_last: float
    trainable_parameters: int
    dtype: str
    seconds: float
    sampling_s: float
    waits: int
    frozen: dict[Module, str]
    modules: tuple[Row, ...]
    counts: dict[str, int] = field(default_factory=dict)
    rewards: Json = field(default_factory=dict)
    sources: tuple[Json, ...] = ()


def train_grpo(run: GrpoRun, means: Means) -> GrpoReport:
    """Trains and writes the delta to `run.out`, which appears by rename, complete or not at all; a log beside.

    Goes on from the last checkpoint in `run.folder`, if there is one. However it ends, no adapter is left with the
    engine. Raises SettingsError for policies that no adapter can hold, Conflict (code `base_not_live`), TrainingError:
    no engine (`no_sampling_engine`), nothing to learn (`no_signal`), engine and trainer apart (`diverged`), failing
    rewards (`reward_failed`), non-finite loss or gradient, a frozen module that changed.
    """
    started, grpo = time.monotonic(), run.grpo
    if because := policy_conflict(run.policies):
        raise SettingsError(because, param=because.partition("=")[0])
    patience = Patience(run.version, grpo.wait_s, means.check, means.tell)
    patience.require_version(means.sampler)
    architecture, processor = read_architecture(run.master), load_processor(run.master)
    transformers.set_seed(grpo.seed)
    how = _precision(run)
    model = load_policy(
        run.master,
        [*run.adapters, *run.earlier],
        architecture,
        how.dtype,
        base=run.base,
        serving=run.serving,
        attention="eager" if how.autocast else None,
    )
    applied = apply_policies(model, architecture, run.policies)
    means.on_ready(applied)
    policy = Policy(
        means.sampler,
        applied,
        earlier_factors(run.earlier, architecture),
        patience,
        version=run.version,
        prefix=f"{run.prefix}-{secrets.token_hex(3)}",
        folder=run.folder / ADAPTER,
        tell=means.tell,
    )
    policy.delete_left()
    steps: list[Step] = []
    with means.score(applied, processor) as scorer:
        wire = WirePictures(means.images.read, ChatRenderer(processor).image_token)
        stream = Stream(run.prompts, grpo.seed)
        image_id = int(model.config.image_token_id)
        batches = Batches(grpo, stream, policy, means.sampler, scorer, wire, patience, image_id, means.tell)
        feed = SampledFeed(grpo, batches, policy, patience)
        try:
            _train(run, means, applied, processor, feed, how.autocast, steps)
        finally:
            feed.close()
        rewards = scorer.counts
    applied.require_frozen(pictures=feed.pictured)
    save_delta(model, run.out, {module: policy.record() for module, policy in run.policies.items()})
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    return _report(run, steps, feed, patience, applied, rewards, time.monotonic() - started)


def grpo_config(
    grpo: GrpoSettings, out: Path, *, bf16: bool = False, more: Mapping[str, Any] | None = None
) -> GRPOConfig:
    """The settings in TRL's words. Nothing is generated, sent or printed by TRL; every update is logged to the watch.

    Learning rates come from the policies' groups; beta and the correction are set after TRL's checks (`GroupTrainer`),
    and passes over a batch are counted there.
    """
    cuda = torch.cuda.is_available()
    words: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": grpo.steps,
        "per_device_train_batch_size": grpo.group_size,
        "gradient_accumulation_steps": 1,
        "num_generations": grpo.group_size,
        "max_completion_length": grpo.max_tokens,
        "temperature": grpo.temperature,
        "beta": 0.0,
        "loss_type": grpo.loss_type,
        "epsilon": grpo.epsilon_low,
        "epsilon_high": grpo.epsilon_high,
        "importance_sampling_level": grpo.ratio_level,
        "use_bias_correction_kl": grpo.unbiased_kl,
        "lr_scheduler_type": "constant_with_warmup" if grpo.schedule == "constant" else grpo.schedule,
        "warmup_steps": grpo.warmup_ratio if grpo.warmup_ratio < 1 else 0.999,
        "max_grad_norm": grpo.max_grad_norm,
        "seed": grpo.seed,
        "data_seed": grpo.seed,
        "use_cpu": not cuda,
        "bf16": bf16,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": grpo.checkpoint_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**(words | dict(more or {})))


@dataclass(frozen=True)
class _Precision:
    dtype: torch.dtype
    autocast: bool = False


def _precision(run: GrpoRun) -> _Precision:
    """As `train.stages.run.precision`: bfloat16 on a CPU is autocast with eager attention over float32 weights."""
    wanted, cuda = run.grpo.precision, torch.cuda.is_available()
    if wanted != "auto" and (run.dtype is not None or run.base != "master"):
        other = f"dtype={run.dtype}" if run.dtype is not None else f"train.base={run.base!r}"
        raise TrainingError(f"grpo.precision={wanted!r} would be ignored: {other} decides", param="grpo.precision")
    if run.dtype is not None or wanted == "auto":
        return _Precision(run.dtype or training_dtype())
    if wanted == "bfloat16":
        return _Precision(torch.bfloat16) if cuda else _Precision(torch.float32, autocast=True)
    return _Precision(torch.float32)


def _train(
    run: GrpoRun, means: Means, applied: Applied, processor: Any, feed: SampledFeed, autocast: bool, steps: list[Step]
) -> None:
    """Runs the updates that are left to do."""

    checkpoints, log = run.folder / CHECKPOINTS, run.folder / LOG
    found = last_checkpoint(checkpoints)
    done = step_of(found) if found is not None else 0
    steps += [step for step in read_steps(log) if step.step <= done]
    write_steps(log, steps)

    def record(step: Step) -> None:
        steps.append(step)
        append_step(log, step)
        means.on_step(step)

    watch = StageWatch(record, means.check)
    config = grpo_config(run.grpo, checkpoints, bf16=applied.mixed or autocast)
    image_id = int(applied.model.config.image_token_id)
    pictures = ModelPictures(processor, means.images, image_id)
    trainer = GroupTrainer(applied, config, run.grpo, feed, pictures, processor, watch, means.check)
    trainer.create_optimizer()
    trainer.train(resume_from_checkpoint=str(found) if found is not None else None)
    if watch.stopped is not None:
        raise watch.stopped


def _report(
    run: GrpoRun,
    steps: Sequence[Step],
    feed: SampledFeed,
    patience: Patience,
    applied: Applied,
    rewards: Json,
    seconds: float,
) -> GrpoReport:
    if not steps:
        raise TrainingError("no update was made", code="no_data")
    tenth = math.ceil(len(steps) / 10)
    rewarded = [step.metrics["reward"] for step in steps if "reward" in step.metrics]
    scored = math.ceil(len(rewarded) / 10)
    return GrpoReport(
        steps=steps[-1].step,
        prompts=feed.counts["asked"],
        answers=feed.answers,
        loss_first=steps[0].loss,
        loss_last=_mean([step.loss for step in steps[-tenth:]]),
        reward_first=_mean(rewarded[:scored]),
        reward_last=_mean(rewarded[-scored:]),
        trainable_parameters=applied.trainable,
        dtype=str(next(applied.model.parameters()).dtype).removeprefix("torch."),
        seconds=round(seconds, 3),
        sampling_s=round(feed.seconds, 3),
        waits=patience.waits,
        frozen=applied.frozen_hashes,
        modules=applied.rows,
        counts=dict(feed.counts),
        rewards=rewards,
        sources=tuple(one.report() for one in run.prompts),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
