"""The trainer daemon and its pipeline; a job may override what is here.

Comes in: a tree. Goes out: `TrainSettings`, frozen, with contradictions refused by both keys. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from noria.methods.grpo import GrpoSettings
from noria.methods.preferences import (
    CpoSettings,
    DpoSettings,
    KtoSettings,
    MpoSettings,
    OrpoSettings,
    SimpoSettings,
)
from noria.methods.table import JobMethod
from noria.module_settings import ModulePolicies, ResolvedPolicy, Section
from noria.records import Module
from noria.rewards import RewardSettings


class QuantizeSettings(Section):
    """GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323)."""

    bits: Literal[4, 8] = 4
    """Bits of a weight. 8 needs a GPU: vLLM's kernel for a CPU takes 4 only."""
    group_size: int = Field(32, ge=16)
    """Weights that share a scale."""
    calibration_samples: int = Field(32, ge=1)
    """Conversations used for calibration."""
    calibration_tokens: int = Field(512, ge=16)
    """Longest calibration sample, in tokens."""
    damp: float = Field(0.01, gt=0, lt=1)
    """Damping of the Hessian's diagonal."""


class VerifySettings(Section):
    """What the quantised artefact must prove against the merged model."""

    max_kl: float = Field(0.5, gt=0)
    """Largest mean KL(merged || quantised) per token on held-out text, in nats."""
    samples: int = Field(16, ge=1)
    """Conversations it is measured on."""
    probe_tolerance: float = Field(0.25, gt=0)
    """Largest mean |difference| of the probe's log-probabilities in the engine against the verifier's, in nats."""


class PolicySettings(Section):
    """When the trainer starts by itself."""

    automatic: bool = True
    """False leaves every start to an operator."""
    min_preferences: int = Field(200, ge=1)
    """Unused training preferences (for a method that learns from thumbs: answers with one) that start a job."""
    min_interval_s: float = Field(3600, ge=0)
    """Least time between two automatic starts, in seconds."""
    window: str | None = None
    """Cron expression (UTC); an automatic job starts only in a minute that it matches. None is any time."""
    method: JobMethod = "dpo"
    """Method of an automatic job. `grpo` uses no preference up: from `min_preferences` on, each `min_interval_s` starts
    another."""
    rollout: Literal["none", "direct"] = "direct"
    """What follows a verified version."""


class TrainSettings(Section):
    """The trainer daemon and its pipeline."""

    policy: PolicySettings = PolicySettings()
    modules: ModulePolicies = ModulePolicies()
    only: Module | None = None
    """Trains this module in full and freezes the two others: short for saying so in `modules`."""
    base: Literal["master", "gptq", "bitsandbytes"] = "master"
    """What a LoRA learns on: full-precision weights, or 4-bit ones (QLoRA): the parent's own serving checkpoint
    (`gptq`), or NF4 (`bitsandbytes`). The result is merged into the master in every case."""
    dpo: DpoSettings = DpoSettings()
    simpo: SimpoSettings = SimpoSettings()
    orpo: OrpoSettings = OrpoSettings()
    cpo: CpoSettings = CpoSettings()
    kto: KtoSettings = KtoSettings()
    mpo: MpoSettings = MpoSettings()
    grpo: GrpoSettings = GrpoSettings()
    reward: RewardSettings = RewardSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    verify: VerifySettings = VerifySettings()
    held_out: float = Field(0.1, ge=0, lt=0.9)
    """Share of prompts (by hash) that never train."""
    min_pairs: int = Field(8, ge=1)
    """Fewest training pairs (for KTO: answers) that a job accepts."""
    preferences: Literal["unused", "all"] = "unused"
    """What a job trains on: judgements (preferences, or thumbs) that no earlier version has learnt from, or every one
    again."""
    lease_s: float = Field(60.0, gt=1)
    """A job whose trainer is silent for so long is taken up by another."""
    poll_s: float = Field(1.0, gt=0)
    """How often the daemon looks for work, in seconds."""
    nice: int = Field(10, ge=0, le=19)
    """Scheduling priority given away to the server on the same machine."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the trainer; none takes every core."""
    processes: int = Field(1, ge=1)
    """Processes that train one stage of a recipe together; they share out a step's micro-batches."""
    accelerate_config: Path | None = None
    """A file for `accelerate launch` that starts them, for FSDP or DeepSpeed (deploy/settings/accelerate/)."""
    keep_merged: bool = False
    """Keep the merged full-precision model of each job."""

    @model_validator(mode="after")
    def _modules_fit_the_method(self) -> Self:
        policies = self.policies()
        said = f'train.only="{self.only}"' if self.only else ""
        for module, allowed in _TRAINABLE_BY_PREFERENCES.items():
            policy = policies[module].policy
            if policy not in allowed:
                raise ValueError(
                    f"{said or f'train.modules.{module}.policy={policy!r}'} contradicts "
                    f"train.policy.method={self.policy.method!r}: there {module} must be {' or '.join(allowed)}"
                )
        if self.base != "master" and policies["language_model"].policy == "full":
            raise ValueError(
                f"{said or 'train.modules.language_model.policy=' + repr('full')} contradicts train.base="
                f"{self.base!r}: 4-bit weights cannot be trained in full; use a LoRA, or train.base='master'"
            )
        return self

    def policies(self) -> dict[Module, ResolvedPolicy]:
        """Who trains in a preference job, every value filled in. Raises ValueError for a contradiction."""
        return self.modules.resolved(only=self.only)


_TRAINABLE_BY_PREFERENCES: Mapping[Module, tuple[str, ...]] = {
    "vision_tower": ("frozen",),
    "aligner": ("frozen", "lora", "full"),
    "language_model": ("lora", "full"),
}
