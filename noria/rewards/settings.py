"""A list of rewards, and when failing ones stop a job.

Comes in: the tree under `train.reward`, or a list on a command line. Goes out: `RewardSettings`, frozen.
Must not import torch or train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from noria.errors import SettingsError
from noria.module_settings import Section
from noria.rewards.options import (
    ExactOptions,
    JsonSchemaOptions,
    JudgeOptions,
    LanguageOptions,
    LengthOptions,
    PreferencesOptions,
    PythonOptions,
    RegexOptions,
    RepetitionOptions,
    RewardOptions,
)

AnyReward = Annotated[
    ExactOptions
    | RegexOptions
    | JsonSchemaOptions
    | LengthOptions
    | LanguageOptions
    | RepetitionOptions
    | JudgeOptions
    | PythonOptions
    | PreferencesOptions,
    Field(discriminator="name"),
]
NAMES: dict[str, type[RewardOptions]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(AnyReward)[0])
}


class RewardSettings(Section):
    """What a sampled answer is worth, for reinforcement learning: a weighted sum of rewards (docs/rewards.md)."""

    rewards: tuple[AnyReward, ...] = ()
    """The rewards, each `{name = "exact", weight = 1.0, ...}` with its own options; docs/rewards.md has them all."""
    max_failure_rate: float = Field(0.1, ge=0, le=1)
    """Share of `failure_window` samples that one reward may fail to judge; past it the job stops."""
    failure_window: int = Field(200, ge=1)
    """The last so many samples, by which a reward's failures are counted."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        require_labels(self.rewards)
        return self


def require_labels(rewards: Sequence[RewardOptions]) -> None:
    """Raises ValueError where two rewards would be shown under one name."""
    twice = [key for key, count in Counter(one.key for one in rewards).items() if count > 1]
    if twice:
        raise ValueError(f"two rewards are called {twice[0]!r}: give one of them a label")


def parse_rewards(value: Any, under: str = "rewards") -> tuple[AnyReward, ...]:
    """A list of rewards from its tree. Raises SettingsError, one line per wrong key: `rewards.0.regex.pattern: ..`."""
    try:
        found = _LIST.validate_python(value)
        require_labels(found)
    except ValidationError as error:
        keys = [".".join([under, *map(str, one["loc"])]) for one in error.errors()]
        told = [
            f"{key}: {one['msg'].removeprefix('Value error, ')}"
            + (" (unknown key)" if one["type"] == "extra_forbidden" else "")
            for key, one in zip(keys, error.errors(), strict=True)
        ]
        raise SettingsError("\n".join(told), param=keys[0]) from error
    except ValueError as error:
        raise SettingsError(f"{under}: {error}", param=under) from error
    return found


_LIST: TypeAdapter[tuple[AnyReward, ...]] = TypeAdapter(tuple[AnyReward, ...])
