"""Rewards: what a sampled answer is worth, and the scorer that adds them up with their weights.

Comes in: `noria.rewards` settings, samples, what a job lends (`Backing`). Goes out: `Scores`. Nothing here but
`train.rewards.preferences` imports torch. Must not import `serve`.
"""

from train.rewards.protocol import Backing, Failure, Reward, Sample, Value
from train.rewards.registry import build, scorer_of
from train.rewards.scorer import Scorer, Scores, Weighted, combine

__all__ = [
    "Backing",
    "Failure",
    "Reward",
    "Sample",
    "Scorer",
    "Scores",
    "Value",
    "Weighted",
    "build",
    "combine",
    "scorer_of",
]
