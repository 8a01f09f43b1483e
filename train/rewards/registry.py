"""From a reward's settings name to the reward.

Comes in: options (`noria.rewards`), what the job lends. Goes out: rewards, and the scorer over all of them. What is
heavy (torch, HTTP) is imported when a reward that needs it is built. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from noria.rewards import (
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
    RewardSettings,
)
from train.rewards.protocol import Backing, Reward
from train.rewards.scorer import Scorer, Weighted, close_all, combine


def _exact(options: ExactOptions, backing: Backing) -> Reward:
    from train.rewards.text.exact import ExactReward

    return ExactReward(options)


def _regex(options: RegexOptions, backing: Backing) -> Reward:
    from train.rewards.text.regex import RegexReward

    return RegexReward(options)


def _json_schema(options: JsonSchemaOptions, backing: Backing) -> Reward:
    from train.rewards.text.json_schema import JsonSchemaReward

    return JsonSchemaReward(options)


def _length(options: LengthOptions, backing: Backing) -> Reward:
    from train.rewards.text.length import LengthReward

    return LengthReward(options, backing)


def _language(options: LanguageOptions, backing: Backing) -> Reward:
    from train.rewards.text.language import LanguageReward

    return LanguageReward(options)


def _repetition(options: RepetitionOptions, backing: Backing) -> Reward:
    from train.rewards.text.repetition import RepetitionReward

    return RepetitionReward(options)


def _judge(options: JudgeOptions, backing: Backing) -> Reward:
    from train.rewards.outside.judge import JudgeReward

    return JudgeReward(options, backing)


def _python(options: PythonOptions, backing: Backing) -> Reward:
    from train.rewards.outside.python import PythonReward

    return PythonReward(options)


def _preferences(options: PreferencesOptions, backing: Backing) -> Reward:
    from train.rewards.preferences.reward import preference_reward

    return preference_reward(options, backing)


BUILDERS: dict[str, Callable[[Any, Backing], Reward]] = {
    "exact": _exact,
    "regex": _regex,
    "json_schema": _json_schema,
    "length": _length,
    "language": _language,
    "repetition": _repetition,
    "judge": _judge,
    "python": _python,
    "preferences": _preferences,
}
"""One entry for each of `noria.rewards.NAMES`."""


def build(options: RewardOptions, backing: Backing | None = None) -> Reward:
    """The reward that the options name.

    Raises SettingsError (a schema that is none, an unknown language, a function that is not there) or TrainingError
    (the job does not lend what it needs; a head below its bound).
    """
    return BUILDERS[str(getattr(options, "name", None))](options, backing if backing is not None else Backing())


def scorer_of(settings: RewardSettings, backing: Backing | None = None) -> Scorer:
    """The scorer that the settings describe. Raises as `build`, and SettingsError where they name no reward."""
    backing = backing if backing is not None else Backing()
    built: list[Weighted] = []
    try:
        for options in settings.rewards:
            built.append(Weighted(build(options, backing), options.weight, options.key))
        return combine(
            built, max_failure_rate=settings.max_failure_rate, window=settings.failure_window, check=backing.check
        )
    except BaseException:
        close_all(one.reward for one in built)
        raise
