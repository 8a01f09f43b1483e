"""What an operator can turn of GRPO (`train.grpo`): prompts, groups, loss, and what bounds the samples' distance.

Comes in: a tree. Goes out: `GrpoSettings`, frozen, with contradictions refused by both keys. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from noria.errors import SettingsError
from noria.module_settings import ResolvedPolicy, Section
from noria.records import MODULES, Module
from noria.rewards import RewardSettings

CAPTURED = "captured"
LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class PromptSource(Section):
    """One source of prompts."""

    source: str = CAPTURED
    """`captured` (conversations of the store, up to their last answer), a made set (`scenes`, `digits`), or a file,
    folder or URL of rows with `messages`, or `prompt` (or `question`) and `image`, and `answers` where known."""
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts, beside the other sources' weights."""
    count: int | None = Field(None, ge=1)
    """So many prompts at most; of captured ones the newest. None is 2000 of captured and drawn ones, all of a file."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions about `scenes` (count, colour, ...); none is all of them."""
    split: str = "train"
    """The part of a set that has parts."""
    seed: int = 0
    """Seed of what is drawn, and of which rows `count` takes."""

    @model_validator(mode="after")
    def _kinds_are_of_scenes(self) -> Self:
        if self.kinds and self.source != "scenes":
            raise ValueError(f"kinds={list(self.kinds)} would be ignored: only source='scenes' has kinds of questions")
        return self


class GrpoSettings(Section):
    """Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300), over groups of answers
    that the serving engine samples."""

    prompts: tuple[PromptSource, ...] = (PromptSource(),)
    """Where prompts come from, mixed by weight."""
    servers: tuple[str, ...] = ()
    """Addresses of servers that sample, `http://`, `https://`, `grpc://` or `grpcs://host:port`; none is the setting
    `url` where it is set, else every server of this home. `tls_ca` says whose certificates are trusted."""
    concurrency: int = Field(8, ge=1)
    """Groups under way at each of them at once."""
    wait_s: float = Field(600.0, ge=0)
    """Longest wait for a server that samples, in seconds: it may restart, or be rolled back to the job's parent."""
    steps: int = Field(100, ge=1)
    """Optimiser updates."""
    prompts_per_step: int = Field(8, ge=1)
    """Groups in one update."""
    group_size: int = Field(8, ge=2)
    """Answers to one prompt."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Answers in one forward; none is group_size."""
    share_prompts: bool = True
    """Run a prompt once for all its answers in a forward, instead of once for each: the same numbers, sooner."""
    iterations: int = Field(1, ge=1)
    """Updates on each batch of groups."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the policy is trained at the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus that is sampled from. Below 1 the recorded probabilities are not those of what is trained."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    max_length: int = Field(4096, ge=32)
    """Prompt plus `max_tokens`, in tokens, pictures included; a longer prompt is left out and counted."""
    loss_type: LossType = "dapo"
    """How token losses are formed and averaged; these are TRL's names, explained in its paper index."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL to the model before training; 0 spares its forward pass, and the KL is not known then."""
    unbiased_kl: bool = True
    """Weigh the KL by the policy's ratio, which makes its gradient unbiased (https://arxiv.org/abs/2512.02556)."""
    epsilon_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 minus this."""
    epsilon_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 plus this; for `cispo`, above this itself."""
    ratio_level: Literal["token", "sequence"] = "token"
    """The ratio of new to old policy: of each token, or one of a whole answer (GSPO, https://arxiv.org/abs/2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the deviation of its group, of the batch, or nothing."""
    importance_sampling: Correction = "token_truncate"
    """How the difference between the engine's weights and the trainer's is corrected: the loss is multiplied by the
    ratio of their probabilities, of each token or of a whole answer, truncated to the bounds or 0 outside them."""
    importance_low: float | None = Field(None, ge=0)
    """The least such ratio; none is no bound."""
    importance_high: float | None = Field(2.0, gt=0)
    """The largest such ratio; none is no bound."""
    divergence: Literal["k3", "absolute"] = "k3"
    """How far the trainer is from the engine on the sampled tokens: an estimate of KL(engine || trainer), mean of
    r - 1 - log r (http://joschu.net/blog/kl-approx.html), or the mean of |log r|."""
    max_divergence: float = Field(0.5, gt=0)
    """The most of it in a batch, in nats a token; above it the job stops before the update."""
    mask_truncated: bool = False
    """Answers that ran into `max_tokens` do not train (they count in their group's mean)."""
    zero_variance: Literal["drop", "resample"] = "resample"
    """A group whose rewards are all the same teaches nothing: leave it out, or ask another prompt in its place."""
    max_rounds: int = Field(8, ge=1)
    """Most rounds of sampling for one update. The job stops when none of them gave a group to learn from."""
    sync_every: int = Field(1, ge=1)
    """Updates after which the engine gets the new weights."""
    overlap: bool = False
    """Sample the next batch while this one trains: its groups are then `iterations` updates old."""
    max_staleness: int = Field(1, ge=0)
    """Most updates between the weights that sampled a group and those it trains; older groups are dropped."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates go after the warm-up."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Share of updates over which the learning rates rise."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clip."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What forward and backward compute in, as for a recipe's stage."""
    checkpoint_every: int = Field(10, ge=1)
    """Updates between two checkpoints that an interrupted job goes on from."""
    seed: int = 0
    """Seed of prompts, sampling and adapters."""

    @field_validator("prompts")
    @classmethod
    def _some_prompts(cls, value: tuple[PromptSource, ...]) -> tuple[PromptSource, ...]:
        if not value:
            raise ValueError("prompts is empty: name at least one source")
        twice = next((one for one in value if value.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"prompts names source={twice.source!r} twice in the same words: say it once, by weight")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for because in (self._loss_conflict(), self._bounds_conflict(), self._staleness_conflict()):
            if because is not None:
                raise ValueError(because)
        return self

    @property
    def micro(self) -> int:
        """Answers in one forward."""
        return self.micro_batch_size or self.group_size

    @property
    def age(self) -> int:
        """The most updates that lie between sampling and training when nothing goes wrong."""
        return self.sync_every - 1 + (self.iterations if self.overlap else 0) + self.iterations - 1

    def _loss_conflict(self) -> str | None:
        if self.loss_type == "cispo" and self.epsilon_high <= 1:
            told = f"grpo.epsilon_high={self.epsilon_high} contradicts grpo.loss_type='cispo'"
            return f"{told}: there it bounds the ratio itself, which is 1 on average; 5 is usual"
        if self.loss_type == "luspo" and self.ratio_level != "sequence":
            return "grpo.loss_type='luspo' contradicts grpo.ratio_level='token': it is defined over whole answers"
        if self.loss_type == "vespo" and (self.ratio_level != "token" or "sequence" in self.importance_sampling):
            told = f"grpo.ratio_level={self.ratio_level!r}, grpo.importance_sampling={self.importance_sampling!r}"
            return f"grpo.loss_type='vespo' contradicts {told}: it weighs whole answers itself; both must be by token"
        return None

    def _bounds_conflict(self) -> str | None:
        low, high = self.importance_low, self.importance_high
        if self.importance_sampling == "none":
            return None
        if low is None and high is None:
            told = "grpo.importance_low and grpo.importance_high are both none"
            return f"{told}: grpo.importance_sampling={self.importance_sampling!r} has nothing to bound"
        if low is not None and high is not None and low >= high:
            return f"grpo.importance_low={low} is not below grpo.importance_high={high}"
        return None

    def _staleness_conflict(self) -> str | None:
        if self.age <= self.max_staleness:
            return None
        told = f"grpo.sync_every={self.sync_every}, grpo.iterations={self.iterations}, grpo.overlap={self.overlap}"
        return f"grpo.max_staleness={self.max_staleness} contradicts {told}: groups would be {self.age} updates old"


def policy_conflict(policies: Mapping[Module, ResolvedPolicy], under: str = "train.") -> str | None:
    """Why GRPO cannot train so, naming the key; none where a LoRA of the language model is all that trains.

    The engine samples from the policy as an adapter beside the live weights, which can hold nothing else.
    """
    for module in MODULES:
        policy, wanted = policies[module], "lora" if module == "language_model" else "frozen"
        key = f"{under}modules.{module}"
        if policy.policy != wanted:
            told = f"{key}.policy={policy.policy!r} contradicts GRPO: the engine samples from an adapter of"
            return f"{told} the language model, so {module} must be {wanted}"
        if policy.dropout:
            told = f"{key}.dropout={policy.dropout} contradicts GRPO: the policy's log-probabilities would be random"
            return f"{told}, and their distance from the engine's with them; use 0"
    return None


def require_trainable(policies: Mapping[Module, ResolvedPolicy], rewards: RewardSettings) -> None:
    """Raises SettingsError, naming the key, for policies that GRPO cannot train, or where no reward is named."""
    if because := policy_conflict(policies):
        raise SettingsError(because, param=because.partition("=")[0])
    if not rewards.rewards:
        raise SettingsError(
            'train.reward.rewards is empty: GRPO needs at least one reward, like [{name = "exact"}]',
            param="train.reward.rewards",
        )
