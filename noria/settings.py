"""The one settings tree: what an operator can turn, with its unit, default and doc.

Comes in: `noria.toml`, `NORIA_*` environment, flags (in that order of precedence). Goes out: a frozen `Settings`.
Environment names nest with two underscores: `NORIA_SERVER__HTTP_PORT=9000`. Unknown keys are refused.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from noria.errors import SettingsError
from noria.methods.grpo import GrpoSettings, policy_conflict
from noria.methods.preferences import (
    CpoSettings,
    DpoSettings,
    KtoSettings,
    MpoSettings,
    OrpoSettings,
    SimpoSettings,
)
from noria.methods.table import METHODS, JobMethod
from noria.module_settings import ModulePolicies, ResolvedPolicy, Section
from noria.records import Module
from noria.rewards import RewardSettings


class ServerSettings(Section):
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address both wires bind to."""
    http_port: int = Field(8000, ge=0, le=65535)
    """HTTP port; 0 takes a free one."""
    grpc_port: int = Field(50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one."""
    served_model_name: str = "noria"
    """The model name that clients send."""
    shutdown_s: float = Field(20.0, ge=0)
    """How long a stopping server lets running requests finish, in seconds."""
    api_key: SecretStr | None = None
    """A bearer key that every HTTP and gRPC call must carry; none asks for none."""


class EngineSettings(Section):
    """What vLLM is started with."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Activation type; `auto` is bfloat16 on a CPU and the checkpoint's own on a GPU."""
    max_model_len: int | None = Field(None, ge=64)
    """Longest prompt plus answer, in tokens; none takes the checkpoint's, at most 4096."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Sequences that run at once; none is 16 on a CPU and vLLM's own on a GPU."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU, in GiB. On a GPU `gpu_memory_utilization` rules."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    enforce_eager: bool | None = None
    """Skip CUDA graphs and compilation; none is true on a CPU and false on a GPU."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads of the engine on a CPU; none takes every core."""
    int8_activations: bool = False
    """Let a CPU with AMX round activations to 8 bits: quicker for one client, but not what was verified. Raise
    train.verify.probe_tolerance to 0.5 with it."""
    fast_start: bool = True
    """Start the engine from a fork server that has vLLM preloaded, its worker inside the engine process."""
    policy_adapters: int = Field(0, ge=0)
    """LoRAs that a trainer may have loaded beside the live version, to sample from; 0 is none. The base then answers
    users at some 0.8 of its speed, loaded or not."""
    policy_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest rank of such a LoRA."""
    args: tuple[str, ...] = ()
    """More of vLLM's own command-line arguments, as they are: `["--enable-lora"]`."""


class SamplingSettings(Section):
    """Sampling for trainers and operators, beside the users' traffic and below it."""

    sequences: int | None = Field(None, ge=1)
    """Samples in the engine at once while no user's request is; none is every sequence that the engine runs."""
    beside_users: int | None = Field(None, ge=0)
    """The same while users' requests are inside; the others are set back and go on later. None is 1 on a CPU and a
    quarter of the sequences on a GPU; with 0 sampling stands still for as long as anybody is answered."""


class CaptureSettings(Section):
    """What is kept of the traffic."""

    default: bool = True
    """Keep completions whose request does not say `store`. `store: false` is always obeyed."""
    queue_size: int = Field(2048, ge=1)
    """Completions that may wait for the store; past it the newest are dropped and counted."""
    commit_ms: int = Field(20, ge=0)
    """How long a write waits for others to share its commit, in milliseconds."""
    batch: int = Field(128, ge=1)
    """Most completions in one commit."""


class StoreSettings(Section):
    """Where records and pictures lie."""

    url: str | None = None
    """SQLAlchemy URL; none is SQLite at NORIA_HOME/noria.db. `postgresql+psycopg://...` works too."""
    blobs: str | None = None
    """fsspec URL of the pictures; none is NORIA_HOME/blobs."""


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


class ReleaseSettings(Section):
    """How a new version goes live."""

    drain_s: float = Field(60.0, gt=0)
    """Longest wait for running requests before a swap; past it the rollout fails and traffic goes on."""
    poll_s: float = Field(0.5, gt=0)
    """How often the server looks for a rollout, in seconds."""


class Settings(BaseSettings):
    """Everything an operator can set. Precedence: flags, then `NORIA_*` environment, then `noria.toml`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="NORIA_",
        env_nested_delimiter="__",
    )

    home: Path = Path("~/.noria")
    """NORIA_HOME: settings, store, pictures, models and jobs."""
    url: str | None = None
    """NORIA_URL: where commands find the server; none is the home's own, else server.http_port here."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    sampling: SamplingSettings = SamplingSettings()
    capture: CaptureSettings = CaptureSettings()
    store: StoreSettings = StoreSettings()
    train: TrainSettings = TrainSettings()
    release: ReleaseSettings = ReleaseSettings()

    @model_validator(mode="after")
    def _expand_home(self) -> Self:
        object.__setattr__(self, "home", self.home.expanduser().resolve())
        return self

    @model_validator(mode="after")
    def _automatic_jobs_can_run(self) -> Self:
        """Here and not in `TrainSettings`, which are those of one job, too: an operator's may be of another method."""
        train = self.train
        if not train.policy.automatic or METHODS[train.policy.method].reads != "prompts":
            return self
        said = f"train.policy.method={train.policy.method!r}"
        advice = "every automatic job would fail; or say train.policy.automatic=false"
        if because := policy_conflict(train.policies()):
            only = f' (train.only="{train.only}")' if train.only else ""
            raise ValueError(f"{said} cannot start jobs: {because}{only}; {advice}")
        if not train.reward.rewards:
            raise ValueError(f"{said} contradicts train.reward.rewards, which is empty: name a reward; {advice}")
        return self

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.store.url or f"sqlite:///{self.home / 'noria.db'}"

    @property
    def blobs_url(self) -> str:
        """The fsspec URL in force."""
        return self.store.blobs or f"file://{self.home / 'blobs'}"

    @property
    def models_dir(self) -> Path:
        """Folder of published versions."""
        return self.home / "models"

    @property
    def masters_dir(self) -> Path:
        """Folder of full-precision base checkpoints."""
        return self.home / "masters"

    @property
    def jobs_dir(self) -> Path:
        """Folder of the jobs' working files."""
        return self.home / "jobs"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the home's `noria.toml`."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=_toml_path(init_settings))
        return init_settings, env_settings, toml


def _toml_path(init: PydanticBaseSettingsSource) -> Path:
    home = init().get("home") or os.environ.get("NORIA_HOME") or "~/.noria"
    return Path(str(home)).expanduser() / "noria.toml"


def load_settings(**flags: Any) -> Settings:
    """Reads the tree; `flags` are nested like it (`server={"http_port": 0}`) and win.

    Raises SettingsError, one line per wrong key, each naming the key.
    """
    _refuse_unknown_environment()
    try:
        return Settings(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as error:
        raise _settings_error(error, under=()) from error


def _refuse_unknown_environment() -> None:
    """pydantic-settings ignores a variable whose first part it does not know: a slip would go unseen."""
    for name in os.environ:
        head, nested, _ = name.removeprefix("NORIA_").lower().partition("__")
        if name.startswith("NORIA_") and nested and head not in Settings.model_fields:
            raise SettingsError(
                f"{name}: there is no section {head!r}; the sections are {', '.join(Settings.model_fields)}", param=name
            )


def override_train(train: TrainSettings, overrides: Mapping[str, Any]) -> TrainSettings:
    """The training settings of one job: `overrides` is a partial tree like `{"dpo": {"beta": 0.2}}` and wins.

    Raises SettingsError, one line per wrong key, each as `settings.dpo.beta`.
    """
    try:
        return TrainSettings.model_validate(_merged(train.model_dump(), overrides))
    except ValidationError as error:
        raise _settings_error(error, under=("settings",)) from error


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _settings_error(error: ValidationError, *, under: tuple[str, ...]) -> SettingsError:
    keys, lines = [], []
    for one in error.errors():
        keys.append(".".join([*under, *map(str, one["loc"])]) or "settings")
        lines.append(f"{keys[-1]}: {one['msg']}" + (" (unknown key)" if one["type"] == "extra_forbidden" else ""))
    return SettingsError("\n".join(lines), param=keys[0])
