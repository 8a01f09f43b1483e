"""Who trains: what an operator may say of each of the three modules, and what it comes to.

Comes in: a partial tree (`[train.modules.aligner] policy = "lora"`), the kind of training's defaults, `only`.
Goes out: a `ResolvedPolicy` for each module with every value filled in, or a refusal that names both keys.
A value that is not stated is none, so that a later layer (a job, a recipe) may state it. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import NoDecode

from noria.records import MODULES, Json, Module

Policy = Literal["frozen", "full", "lora"]
_LORA_KEYS = ("rank", "alpha", "dropout", "targets")
_TRAINED_KEYS = ("learning_rate", "weight_decay", "last_blocks")


class Section(BaseModel):
    """A part of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModuleSettings(Section):
    """One module. A word alone (`"frozen"`, `"full"`, `"lora"`) stands for its policy.

    LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    policy: Policy | None = None
    """`frozen`, `full` or `lora`; none is the default of the kind of training."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; none is the default of the kind of training."""
    weight_decay: float | None = Field(None, ge=0)
    """AdamW's decay of matrices (biases and norms are spared); none is 0."""
    rank: int | None = Field(None, ge=1)
    """LoRA's rank r; none is 16."""
    alpha: float | None = Field(None, gt=0)
    """LoRA's scale numerator, the update is alpha/rank * B A; none is 32."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on the adapter's input; none is 0."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last names of the module's linears that get a LoRA, like `["q_proj", "v_proj"]`; none is all of them."""
    last_blocks: int | None = Field(None, ge=1)
    """Train only the last k blocks of the tower, or decoder layers; none is the whole module."""
    gradient_checkpointing: bool | None = None
    """Compute the module's blocks again on the way back instead of keeping them; none is yes on a GPU."""


def _module_settings(value: Any) -> Any:
    """`"lora"` is `{"policy": "lora"}`; the environment hands over JSON as text."""
    if isinstance(value, str):
        return json.loads(value) if value.lstrip().startswith("{") else {"policy": value}
    return value


# NoDecode: pydantic-settings would refuse NORIA_TRAIN__MODULES__ALIGNER=full for not being JSON.
Stated = Annotated[ModuleSettings, BeforeValidator(_module_settings), NoDecode]


@dataclass(frozen=True)
class ResolvedPolicy:
    """One module's policy, every value filled in. What does not apply is 0 (rates, rank) or none.

    `targets` none is every linear of the module, `last_blocks` none the whole module, `gradient_checkpointing` none
    the trainer's choice.
    """

    policy: Policy
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    last_blocks: int | None = None
    gradient_checkpointing: bool | None = None

    @property
    def trains(self) -> bool:
        """Whether anything of the module learns."""
        return self.policy != "frozen"

    def record(self) -> Json:
        """What a manifest says of it: only what applies."""
        if not self.trains:
            return {"policy": "frozen"}
        told: Json = {"policy": self.policy, "learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        if self.policy == "lora":
            told |= {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
            told |= {"targets": list(self.targets)} if self.targets else {}
        return told | ({"last_blocks": self.last_blocks} if self.last_blocks else {})


@dataclass(frozen=True)
class PolicyDefaults:
    """What a kind of training does with what is not stated: each module's policy, and the learning rates."""

    policies: Mapping[Module, Policy]
    full_rates: Mapping[Module, float]
    lora_rate: float


PREFERENCE = PolicyDefaults(
    policies={"vision_tower": "frozen", "aligner": "frozen", "language_model": "lora"},
    full_rates={"vision_tower": 1e-6, "aligner": 1e-5, "language_model": 1e-6},
    lora_rate=5e-5,
)


class ModulePolicies(Section):
    """Who trains, module by module."""

    vision_tower: Stated = ModuleSettings()
    """The ViT."""
    aligner: Stated = ModuleSettings()
    """The projector or merger between ViT and language model."""
    language_model: Stated = ModuleSettings()
    """The LLM."""

    def resolved(
        self, defaults: PolicyDefaults = PREFERENCE, only: Module | None = None, under: str = "train."
    ) -> dict[Module, ResolvedPolicy]:
        """Every module's policy with every value filled in.

        `only` stands for: that module full, the others frozen. `under` is what stands before `modules` in a key.
        Raises ValueError, naming both keys, for a contradiction: a value that would be ignored, a policy against
        `only`, nothing that trains.
        """
        stated: dict[Module, ModuleSettings] = {module: getattr(self, module) for module in MODULES}
        policies = {module: _policy_of(module, stated[module], defaults, only, under) for module in MODULES}
        if all(policy == "frozen" for policy in policies.values()):
            keys = ", ".join(f"{under}modules.{module}.policy" for module in MODULES)
            raise ValueError(f"{keys} are all 'frozen': nothing would train")
        for module in MODULES:
            because = f'{under}only="{only}"' if only else f"{under}modules.{module}.policy={policies[module]!r}"
            default = "" if only or stated[module].policy else ", its default here"
            _refuse_ignored(module, stated[module], policies, f"{under}modules.{module}", because + default)
        return {module: _fill(module, stated[module], policies[module], defaults) for module in MODULES}


def _policy_of(
    module: Module, stated: ModuleSettings, defaults: PolicyDefaults, only: Module | None, under: str
) -> Policy:
    if only is None:
        return stated.policy or defaults.policies[module]
    wanted: Policy = "full" if module == only else "frozen"
    if stated.policy not in (None, wanted):
        raise ValueError(
            f'{under}modules.{module}.policy={stated.policy!r} contradicts {under}only="{only}", '
            f"which stands for {module}={wanted!r}; drop one of the two"
        )
    return wanted


def _refuse_ignored(
    module: Module, stated: ModuleSettings, policies: Mapping[Module, Policy], key: str, because: str
) -> None:
    """Raises ValueError for a value that the module's policy would ignore."""
    policy = policies[module]
    ignored: tuple[str, ...] = {"frozen": (*_TRAINED_KEYS, *_LORA_KEYS), "full": _LORA_KEYS, "lora": ()}[policy]
    for name in ignored:
        value = getattr(stated, name)
        if value is not None:
            raise ValueError(f"{key}.{name}={value!r} contradicts {because}: it would be ignored; drop one of the two")
    if module == "aligner" and stated.last_blocks is not None:
        raise ValueError(f"{key}.last_blocks={stated.last_blocks} cannot be obeyed: an aligner has no blocks")
    upstream = MODULES[: MODULES.index(module) + 1]  # gradients pass a frozen module only on their way to these
    if stated.gradient_checkpointing and all(policies[one] == "frozen" for one in upstream):
        raise ValueError(
            f"{key}.gradient_checkpointing=True contradicts {because}: no gradient passes through it, so there is "
            "nothing to compute again; drop one of the two"
        )


def _fill(module: Module, stated: ModuleSettings, policy: Policy, defaults: PolicyDefaults) -> ResolvedPolicy:
    if policy == "frozen":
        return ResolvedPolicy("frozen", gradient_checkpointing=stated.gradient_checkpointing)
    default_rate = defaults.lora_rate if policy == "lora" else defaults.full_rates[module]
    lora = policy == "lora"
    return ResolvedPolicy(
        policy,
        learning_rate=stated.learning_rate or default_rate,
        weight_decay=stated.weight_decay or 0.0,
        rank=(stated.rank or 16) if lora else 0,
        alpha=(stated.alpha or 32.0) if lora else 0.0,
        dropout=stated.dropout or 0.0,
        targets=stated.targets,
        last_blocks=stated.last_blocks,
        gradient_checkpointing=stated.gradient_checkpointing,
    )
