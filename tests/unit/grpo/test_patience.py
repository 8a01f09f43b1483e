"""Prompts at which the engine fails each time, told apart from an engine that is gone; without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from noria.errors import TrainingError, Unavailable
from noria.records import Json
from noria.sampling.records import Drawing, Group
from tests.unit.grpo.scripted import ScriptedSampler
from train.methods.grpo.sampling import patience as waiting
from train.methods.grpo.sampling.patience import TRIES, Patience


class Failing(ScriptedSampler):
    """A sampler that fails at `poison`, and at every prompt in the next `down` calls."""

    def __init__(self, *poison: str) -> None:
        self.poison = poison
        self.down = 0
        self.asked: list[str] = []

    def groups(self, asked: list[Sequence[Json]], drawing: Drawing, adapter: str | None) -> Iterator[Group]:
        """Answers whom it can, and fails then."""
        failed = False
        self.down -= 1
        for place, messages in enumerate(asked):
            text = str(messages[0]["content"])
            self.asked.append(f"{text} x {drawing.n}")
            if self.down >= 0 or text in self.poison:
                failed = True
            else:
                yield Group(place, tuple(messages), "here", "v1")
        if failed:
            raise Unavailable("the engine could not go on")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses."""
    monkeypatch.setattr(waiting, "_FIRST_PAUSE_S", 0.0)


def said(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def sampled(patience: Patience, sampler: Failing, *texts: str) -> list[str | None]:
    """Each prompt's error."""
    found = patience.sample(sampler, None, [said(text) for text in texts], Drawing(n=4))
    return [found[place].error for place in range(len(texts))]


def test_where_others_are_answered_a_prompt_that_never_is_is_refused() -> None:
    patience, sampler = Patience("v1", 60.0, lambda: None), Failing("b")
    assert sampled(patience, sampler, "a", "b", "c") == [None, "the engine could not go on", None]
    assert sampler.asked == ["a x 4", "b x 4", "c x 4", *["b x 4"] * (TRIES - 1), "c x 1", "b x 4"]
    sampler.asked.clear()
    assert sampled(patience, sampler, "b") == ["the engine could not go on"]  # alone, later: others were answered
    assert sampler.asked == [*["b x 4"] * TRIES, "c x 1", "b x 4"]


def test_an_engine_that_is_gone_is_waited_for_and_no_prompt_blamed() -> None:
    patience, sampler = Patience("v1", 60.0, lambda: None), Failing()
    assert sampled(patience, sampler, "a") == [None]
    sampler.down = 20
    assert sampled(patience, sampler, "b", "c") == [None, None]
    assert patience.waits >= 10


def test_where_nothing_was_ever_answered_the_wait_ends_the_job() -> None:
    patience, sampler = Patience("v1", 0.2, lambda: None), Failing("a")
    with pytest.raises(TrainingError, match="no engine samples: the engine could not go on"):
        sampled(patience, sampler, "a")
