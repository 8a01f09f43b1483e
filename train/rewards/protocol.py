"""What a reward is, what it may look at, and what a job lends it.

Comes in: nothing. Goes out: `Sample`, `Reward`, `Failure`, `Backing`. Must not import torch or `serve`: the processes
that run users' functions import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from noria.records import Json, Pair

if TYPE_CHECKING:
    from train.data.samples import LoadImage


@dataclass(frozen=True)
class Sample:
    """One sampled answer, and what is known of its prompt.

    `prompt` is OpenAI-shaped; `answers` are the right ones, where known; `extra` are the other columns of the prompt's
    row (`options`, `metric`, ...). `tokens` is how many were sampled, where known.
    """

    prompt: list[Json]
    text: str
    finish_reason: str = "stop"
    answers: tuple[str, ...] = ()
    extra: Json = field(default_factory=dict)
    tokens: int | None = None

    @property
    def cut(self) -> bool:
        """Whether its limit of tokens ended it."""
        return self.finish_reason == "length"

    def to_json(self) -> Json:
        """Every field, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Sample:
        """What `to_json` gave."""
        return cls(**{**told, "answers": tuple(told["answers"])})


@dataclass(frozen=True)
class Failure:
    """A sample that a reward could not judge; `reason` is a short stable word, and never a prompt's or an answer's."""

    reason: str


UNJUDGED = Failure("unjudged")  # what a plain None stands for
Value = float | Failure | None
"""What a reward says of one sample: a number, or why there is none; None is a failure without a reason."""


class Reward(Protocol):
    """Judges samples: one value for each, in order.

    What it raises costs the samples that it was given, but a NoriaError goes through and ends the job. What it holds
    (a process, connections) it gives back in `close`, if it has one; `figures`, if it has some, are told with its
    counts.
    """

    @property
    def name(self) -> str:
        """The settings' name of this kind of reward."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Value]:
        """The samples' values; bounded in time by the reward's own settings."""


Pairs = Callable[[], tuple[Sequence[Pair], Sequence[Pair]]]
"""Pairs to learn from, and pairs held out."""


@dataclass(frozen=True)
class Backing:
    """What a job lends its rewards; what is none, a reward that needs it refuses to be built.

    `model` and `processor` are a checkpoint's, as transformers loads them, and each is asked for once by a reward that
    needs it. Within `frozen()` the model is the one that features are taken from, without the adapter that is being
    trained (`Applied.reference`), and under the autocast that it needs (`Applied.mixed`). `pairs` are the store's.
    `folder` is where a head is kept that is learnt here. `check` is called between forwards and may raise to stop.
    """

    processor: Callable[[], Any] | None = None
    model: Callable[[], Any] | None = None
    frozen: Callable[[], AbstractContextManager[Any]] = nullcontext
    load_image: LoadImage | None = None
    pairs: Pairs | None = None
    folder: Path | None = None
    check: Callable[[], None] = lambda: None
