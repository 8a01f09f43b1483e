"""Groups of sampled answers with their rewards, and what they teach: advantages, and which answers take part.

Comes in: a sampler's groups, a scorer's totals. Goes out: `Group`s with advantages, or the reason why one teaches
nothing. Values only: must not import torch or `serve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from noria.records import Json

STD_FLOOR = 1e-4  # added to a deviation before it divides, as TRL does
SAME = 1e-8  # rewards closer than this are the same


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation in OpenAI's shape that ends before the answer, pictures as references.

    `source` says where it came from (`captured:chatcmpl-..`, `file:line`); `answers` are right ones, where known.
    """

    source: str
    messages: tuple[Json, ...]
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One sampled answer. `logprobs` are the engine's of its tokens, in nats; `reward` is None where nobody could judge
    it. `trains` is False for one that only counts in its group's mean."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    reward: float | None = None
    trains: bool = True

    @property
    def cut(self) -> bool:
        """Whether its limit of tokens ended it."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, all sampled by the policy as it was after `update` updates, on `version`'s weights."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    update: int
    version: str

    @property
    def rewards(self) -> list[float | None]:
        """One an answer."""
        return [one.reward for one in self.answers]

    @property
    def same(self) -> bool:
        """Whether its judged answers are all worth the same, so that none is better than the others."""
        judged = [one for one in self.rewards if one is not None]
        return len(judged) < 2 or max(judged) - min(judged) <= SAME

    @property
    def teaches(self) -> bool:
        """Whether an answer that trains is better or worse than the group's mean."""
        mean = _mean([one for one in self.rewards if one is not None])
        return not self.same and any(
            one.trains and one.reward is not None and abs(one.reward - mean) > SAME for one in self.answers
        )


def advantages(groups: Sequence[Group], scale: Literal["group", "batch", "none"]) -> list[list[float]]:
    """How much better each answer is than its group's mean, (r - mean) / (std + 1e-4); 0 for one nobody could judge.

    Shao et al. 2024, 4.1.2; without the division: Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783. `batch`
    divides by the deviation of all groups' rewards. Deviations are of samples (n - 1), as TRL's.
    """
    whole = deviation([reward for group in groups for reward in group.rewards])
    found = []
    for group in groups:
        mean = _mean([one for one in group.rewards if one is not None])
        by = {"group": deviation(group.rewards), "batch": whole, "none": None}[scale]
        found.append(
            [
                0.0 if reward is None else (reward - mean) / (1.0 if by is None else by + STD_FLOOR)
                for reward in group.rewards
            ]
        )
    return found


def deviation(rewards: Iterable[float | None]) -> float:
    """The standard deviation of those that were judged (n - 1), 0 for fewer than two."""
    judged = [one for one in rewards if one is not None]
    if len(judged) < 2:
        return 0.0
    mean = _mean(judged)
    return math.sqrt(sum((one - mean) ** 2 for one in judged) / (len(judged) - 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
