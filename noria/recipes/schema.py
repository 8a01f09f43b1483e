"""What a recipe may say: its stages, and for each the modules that train, the data, the schedule.

Comes in: a tree as TOML gives it. Goes out: `Recipe`, frozen, with each stage's policies resolved.
Must not import torch.

| kind | trains by default | data | loss |
|---|---|---|---|
| vision | tower full | labels and boxes | cross-entropy of heads that are thrown away, and boxes |
| words | aligner full | boxes that say a word | squared distance to the language model's embedding of the word |
| align | aligner full | conversations | next token, answers only |
| sft | aligner full, language model LoRA | conversations | next token, answers only |
| dpo, simpo, orpo, cpo, mpo | language model LoRA | preferences | the method's (docs/methods.md) |
| kto | language model LoRA | answers with a verdict, or preferences | Kahneman-Tversky optimisation |
| finetune | everything full at 1e-6 | conversations | next token, answers only |
| grpo | language model LoRA | prompts (`grpo.prompts`) | group relative policy optimisation |
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from noria.methods.grpo import GrpoSettings, policy_conflict
from noria.methods.preferences import CpoLoss, DpoLoss, KtoLoss, MpoLoss, OrpoLoss, PreferenceLoss, SimpoLoss
from noria.methods.table import LABELLED_KINDS, METHODS, PREFERENCE_KINDS, JobMethod, Reads
from noria.module_settings import PREFERENCE, ModulePolicies, Policy, PolicyDefaults, ResolvedPolicy, Section
from noria.records import MODULES, Module
from noria.rewards import RewardSettings
from noria.settings import QuantizeSettings, VerifySettings

StageKind = Literal["vision", "words", "align", "sft", "finetune", JobMethod]
DataFormat = Literal["auto", "noria", "openai", "ms-swift", "llama-factory", "trl", "llava", "image-text", "labels"]

DECAY = 0.2  # the end of a `constant-linear` schedule: Hägele et al. 2024, https://arxiv.org/abs/2405.18392
_FULL_RATES: dict[Module, float] = {"vision_tower": 2e-6, "aligner": 2e-5, "language_model": 1e-5}


def _defaults(policies: tuple[Policy, Policy, Policy], lora_rate: float = 1e-4, **rates: float) -> PolicyDefaults:
    by_module = dict(zip(MODULES, policies, strict=True))
    return PolicyDefaults(by_module, {module: rates.get(module, _FULL_RATES[module]) for module in MODULES}, lora_rate)


KIND_DEFAULTS: dict[StageKind, PolicyDefaults] = {
    "vision": _defaults(("full", "frozen", "frozen"), vision_tower=1e-4),
    "words": _defaults(("frozen", "full", "frozen"), aligner=2e-3),
    "align": _defaults(("frozen", "full", "frozen"), aligner=1e-3),
    "sft": _defaults(("frozen", "full", "lora")),
    "finetune": _defaults(("full", "full", "full"), vision_tower=1e-6, aligner=1e-6, language_model=1e-6),
    **dict.fromkeys(PREFERENCE_KINDS, PREFERENCE),
    "grpo": PREFERENCE,
}


class DataSource(Section):
    """One source of training data."""

    source: str
    """A file, a folder, an http(s), s3 or other fsspec URL, a Hugging Face dataset, or a built-in name (`scenes`)."""
    format: DataFormat = "auto"
    """How rows are written; `auto` looks at the first ones."""
    split: str = "train"
    """The part of a dataset that has parts."""
    count: int | None = Field(None, ge=1)
    """So many rows at most; none is all, and of what is drawn 10,000 scenes, 1,400 digits or 200 photographs."""
    seed: int = 0
    """Seed of what is drawn, and of which rows `count` takes."""
    weight: float = Field(1.0, gt=0)
    """How often a row is seen in one pass, beside the other sources: 2 is twice; 0.5 takes half of the rows."""
    strict: bool = False
    """Stop at the first bad row, in place of reporting and counting it."""


class RecipeStage(Section):
    """One stage of training; it starts from what the stage before it left."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """Its name in folders, logs and manifest: lower case, digits and dashes."""
    kind: StageKind
    """What is learnt, from which data, with which loss."""
    data: tuple[DataSource, ...] = ()
    """Sources, mixed by weight."""
    modules: ModulePolicies = ModulePolicies()
    """Policy of each module; what is not said is the kind's default."""
    only: Module | None = None
    """This module in full, the others frozen; in place of `modules`."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; either this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; either this or `steps`."""
    batch_size: int = Field(8, ge=1)
    """Samples (packed: sequences) in one optimiser step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples in one forward; divides batch_size. None is 1 where samples are packed, else a divisor up to 4."""
    schedule: Literal["constant", "linear", "cosine", "constant-linear"] | None = None
    """How the learning rates go after the warm-up: stay, fall to nothing, or stay and then fall (`constant-linear`).
    None is cosine; for `dpo` and its kin it is linear."""
    decay_ratio: float | None = Field(None, gt=0, le=1)
    """Share of steps at the end over which a `constant-linear` schedule falls; none is 0.2."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of steps over which the rates rise."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clip."""
    max_length: int = Field(2048, ge=32)
    """Longest sequence, in tokens; a longer one is cut behind its pictures, or left out and counted."""
    packing: bool = False
    """Put many samples into one sequence of max_length, attention and positions kept apart."""
    group_by_length: bool = False
    """Batches of samples of like length."""
    keep_language: float | None = Field(None, gt=0)
    """Conversations without pictures are not learnt but kept: this times KL(model before its LoRA || model), on each of
    their tokens, in place of their answers' cross-entropy."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints that an interrupted stage goes on from; none is 100."""
    beta: float | None = Field(None, gt=0)
    """`dpo.beta`, in short: strength of the pull to the reference, for `dpo` alone."""
    dpo: DpoLoss | None = None
    """The loss of a stage `dpo`, where it is not the plain one: `{loss_type = "ipo"}`."""
    simpo: SimpoLoss | None = None
    """The same for `simpo`."""
    orpo: OrpoLoss | None = None
    """The same for `orpo`."""
    cpo: CpoLoss | None = None
    """The same for `cpo`."""
    kto: KtoLoss | None = None
    """The same for `kto`."""
    mpo: MpoLoss | None = None
    """The same for `mpo`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What forward and backward compute in; what trains is float32 in any case. `auto` is bfloat16 weights on a GPU and
    float32 on a CPU. `bfloat16` on a CPU keeps float32 weights and computes under autocast, with eager attention: on
    matrix units (AMX) a step takes less than half the time. `float32` does without lower precision on a GPU, too."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Rate of the heads that a `vision` stage throws away afterwards; none is 1e-3."""
    seed: int = 0
    """Seed of data order, heads and adapters."""
    grpo: GrpoSettings | None = None
    """Everything of a `grpo` stage: as train.grpo, of which it takes `servers` and `wait_s` where it says none."""
    reward: RewardSettings | None = None
    """What answers are worth in a `grpo` stage; none is train.reward."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "grpo":
            self._require_grpo_alone()
            return self
        if not self.data:
            raise ValueError("data is empty: name at least one source")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say either steps or epochs, one of them")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            told = f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            raise ValueError(told)
        if self.packing and self.group_by_length:
            raise ValueError("packing and group_by_length contradict each other: a packed sequence is always full")
        if self.packing and self.keep_language is not None:
            raise ValueError("packing and keep_language contradict each other: a packed sequence has pictures and none")
        for key, kinds, why in _IGNORED:
            value = getattr(self, key)
            if self.kind in kinds and value != type(self).model_fields[key].default:
                told = key if isinstance(value, Section) else f"{key}={value!r}"
                raise ValueError(f"{told} would be ignored: kind={self.kind!r} {why}")
        self._require_one_loss()
        self._require_rates_in_order()
        return self

    def _require_one_loss(self) -> None:
        if self.beta is not None and self.dpo is not None and self.dpo.beta is not None:
            raise ValueError(f"beta={self.beta} and dpo.beta={self.dpo.beta} say the same twice; drop one of the two")
        if self.kind == "kto" and self.micro < 2:
            told = "micro_batch_size=1" if self.micro_batch_size == 1 else f"batch_size={self.batch_size}"
            raise ValueError(f"{told} contradicts kind='kto': its KL is over the answers of a forward, 2 at least")

    def _require_grpo_alone(self) -> None:
        own = ("name", "kind", "modules", "only", *METHODS[self.kind].sections)
        for key, value in self:
            if key not in own and value != type(self).model_fields[key].default:
                told = f"{key}={value!r} would be ignored: a stage of kind='grpo' is told by its table `grpo`"
                raise ValueError(told + (" (`grpo.prompts`)" if key == "data" else ""))

    def _require_rates_in_order(self) -> None:
        if self.schedule != "constant-linear":
            if self.decay_ratio is not None:
                schedule = "the kind's own schedule" if self.schedule is None else f"schedule={self.schedule!r}"
                told = f"decay_ratio={self.decay_ratio} would be ignored: {schedule}"
                raise ValueError(f'{told} has no fall of its own length; say schedule="constant-linear"')
        elif self.warmup_ratio + self.decay > 1:
            told = f"warmup_ratio={self.warmup_ratio} and decay_ratio={self.decay} are more than the whole stage"
            raise ValueError(f"{told}: together they are 1 at most")

    @model_validator(mode="after")
    def _modules_fit_the_kind(self) -> Self:
        policies = self.policies
        for module in _UNREACHED[self.kind]:
            if policies[module].trains:
                said = f"only={self.only!r}" if self.only else f"modules.{module}.policy={policies[module].policy!r}"
                raise ValueError(f"{said} contradicts kind={self.kind!r}: {_WHY[self.kind]}")
        needed = _MUST_TRAIN[self.kind]
        if not any(policies[module].trains for module in needed):
            told = " or ".join(f"modules.{module}" for module in needed)
            raise ValueError(f"nothing would train that kind={self.kind!r} is for: {told} must be full or lora")
        if self.kind == "grpo" and (because := policy_conflict(policies, under="")):
            raise ValueError(because)
        return self

    @model_validator(mode="after")
    def _keeps_what_a_lora_changes(self) -> Self:
        policy = self.policies["language_model"].policy
        if self.keep_language is not None and policy != "lora":
            told = f"keep_language={self.keep_language} contradicts modules.language_model.policy={policy!r}"
            raise ValueError(f"{told}: the model before is the one without its LoRA")
        return self

    @property
    def policies(self) -> dict[Module, ResolvedPolicy]:
        """Every module's policy, every value filled in. Raises ValueError where they contradict each other."""
        return self.modules.resolved(KIND_DEFAULTS[self.kind], only=self.only, under="")

    @property
    def loss(self) -> PreferenceLoss:
        """The loss of a stage of a preference method, as it says or the method's plain one."""
        stated: PreferenceLoss = getattr(self, self.kind) or LOSSES[self.kind]()
        if isinstance(stated, DpoLoss) and self.beta is not None:
            return stated.model_copy(update={"beta": self.beta})
        return stated

    @property
    def decay(self) -> float:
        """Share of steps over which a `constant-linear` schedule falls."""
        return DECAY if self.decay_ratio is None else self.decay_ratio

    @property
    def micro(self) -> int:
        """Samples in one forward: as said, else 1 where they are packed, else a divisor of batch_size up to 4."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        most = 1 if self.packing else min(4, self.batch_size)
        return next(n for n in range(most, 0, -1) if self.batch_size % n == 0)


class Recipe(Section):
    """A list of stages, from a model to a version."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Its name in jobs and manifests."""
    model: str | None = None
    """A version's id or an added model's name; none is the live version."""
    stages: tuple[RecipeStage, ...]
    """In order."""
    quantize: dict[str, Any] = Field(default_factory=dict)
    """What differs from the settings' train.quantize."""
    verify: dict[str, Any] = Field(default_factory=dict)
    """What differs from the settings' train.verify."""

    @field_validator("quantize", "verify")
    @classmethod
    def _known_keys(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        (QuantizeSettings if info.field_name == "quantize" else VerifySettings).model_validate(value)
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if not self.stages:
            raise ValueError("a recipe has at least one stage")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are named {twice[0]!r}")
        return self

    def folder_of(self, index: int) -> str:
        """The name of a stage's folder: `01-NAME`."""
        return f"{index + 1:02d}-{self.stages[index].name}"


_CONVERSATIONS: tuple[StageKind, ...] = ("align", "sft", "finetune")
LOSSES: dict[str, type[PreferenceLoss]] = {
    "dpo": DpoLoss,
    "simpo": SimpoLoss,
    "orpo": OrpoLoss,
    "cpo": CpoLoss,
    "kto": KtoLoss,
    "mpo": MpoLoss,
}


def _but(method: str) -> tuple[StageKind, ...]:
    """Every kind of stage but that of this method."""
    return tuple(kind for kind in KIND_DEFAULTS if kind != method)


_LACKS: dict[Reads, str] = {
    "preferences": "has another loss",
    "thumbs": "has another loss",
    "prompts": "samples nothing",
}
_IGNORED: tuple[tuple[str, tuple[StageKind, ...], str], ...] = (
    ("packing", (*LABELLED_KINDS, *PREFERENCE_KINDS), "reads no conversations"),
    ("group_by_length", (*LABELLED_KINDS, *PREFERENCE_KINDS), "reads no conversations"),
    ("keep_language", (*LABELLED_KINDS, *PREFERENCE_KINDS), "learns no conversations"),
    ("beta", (*LABELLED_KINDS, *_CONVERSATIONS), "has no reference"),
    ("beta", tuple(kind for kind in PREFERENCE_KINDS if kind != "dpo"), "has a table of its own for it; say it there"),
    ("head_learning_rate", ("words", *PREFERENCE_KINDS, *_CONVERSATIONS), "has no heads"),
    ("precision", PREFERENCE_KINDS, "computes in the machine's own"),
    *((section, _but(method), _LACKS[row.reads]) for method, row in METHODS.items() for section in row.sections),
)
_UNREACHED: dict[StageKind, tuple[Module, ...]] = {
    "vision": ("aligner", "language_model"),
    "words": ("vision_tower", "language_model"),
    "align": (),
    "sft": (),
    "finetune": (),
    **dict.fromkeys(PREFERENCE_KINDS, ("vision_tower",)),
    "grpo": ("vision_tower", "aligner"),
}
_WHY: dict[StageKind, str] = {
    "vision": "its heads read the tower alone, so this module must be frozen",
    "words": "the aligner alone is held against the language model's embeddings, so this module must be frozen",
    **dict.fromkeys(PREFERENCE_KINDS, "preference methods freeze the tower"),
    "grpo": "the engine samples from an adapter of the language model",
}
_MUST_TRAIN: dict[StageKind, tuple[Module, ...]] = {
    "vision": ("vision_tower",),
    "words": ("aligner",),
    "align": ("aligner",),
    "sft": ("aligner", "language_model", "vision_tower"),
    "finetune": MODULES,
    **dict.fromkeys(PREFERENCE_KINDS, ("language_model", "aligner")),
    "grpo": ("language_model",),
}
