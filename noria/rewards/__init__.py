"""What a sampled answer is worth: the rewards' names and options, checked without torch; `train.rewards` computes them.

Comes in: a list as TOML gives it. Goes out: frozen options, one model a reward. Must not import torch or train.
"""

from noria.rewards.options import (
    ExactOptions,
    FeatureState,
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
from noria.rewards.settings import NAMES, AnyReward, RewardSettings, parse_rewards

__all__ = [
    "NAMES",
    "AnyReward",
    "ExactOptions",
    "FeatureState",
    "JsonSchemaOptions",
    "JudgeOptions",
    "LanguageOptions",
    "LengthOptions",
    "PreferencesOptions",
    "PythonOptions",
    "RegexOptions",
    "RepetitionOptions",
    "RewardOptions",
    "RewardSettings",
    "parse_rewards",
]
