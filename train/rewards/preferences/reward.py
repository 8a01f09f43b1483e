"""Reward `preferences`: how well the store's annotators would like a sample, as a head tells it.

Comes in: options, and from the job a model, its processor, pictures and pairs. Goes out: scores.
Must not import `serve`.

Pairs compare answers to one prompt, so only differences between answers to one prompt mean anything; from prompt to
prompt the scores' level is arbitrary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from noria.errors import TrainingError
from noria.records import Json
from noria.rewards import FeatureState, PreferencesOptions
from train.rewards.preferences.features import Answered, FeatureReader
from train.rewards.preferences.head import Head, load_head, save_head
from train.rewards.preferences.learn import PROBE, learn_head, require_accuracy
from train.rewards.protocol import Backing, Failure, Sample, Value


class PreferenceReward:
    """A head over a reader's features. `figures` are the head's: its accuracy, its penalty, its hash."""

    name = "preferences"

    def __init__(self, head: Head, reader: FeatureReader, options: PreferencesOptions) -> None:
        self._head = head
        self._reader = reader
        self._sigmoid = options.value == "sigmoid"

    @property
    def figures(self) -> Json:
        """What `head.json` says."""
        return self._head.figures

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """Raw scores, of mean 0 and deviation 1 over the answers that the head was learnt from, or their sigmoid."""
        return [self._value(state) for state in self._reader.read([Answered.of(sample) for sample in samples])]

    def _value(self, state: torch.Tensor | Failure) -> Value:
        if isinstance(state, Failure):
            return state
        score = self._head.scores(state[None])[0]
        return float(torch.sigmoid(score) if self._sigmoid else score)


def preference_reward(options: PreferencesOptions, backing: Backing) -> PreferenceReward:
    """The reward: from the options' head, else from one that this job has learnt before, else learnt now.

    Raises TrainingError: the job lends no model or no pairs, the head is another model's, or below `min_accuracy`.
    """
    kept = None if backing.folder is None else backing.folder / f"reward-{options.key}"
    folder = options.head or (kept if kept is not None and kept.is_dir() else None)
    if folder is None:
        return _learnt(options, backing, kept)
    head = load_head(folder)
    reader = _reader(options, backing, head.figures["state"])
    probe_D = reader.read([PROBE])[0]
    if isinstance(probe_D, Failure):
        raise TrainingError(f"the model's features cannot be read: {probe_D.reason}", code="no_features")
    head.require_model(probe_D)
    require_accuracy(head, options)
    return PreferenceReward(head, reader, options)


def _learnt(options: PreferencesOptions, backing: Backing, kept: Path | None) -> PreferenceReward:
    if backing.pairs is None:
        raise _missing("preferences to learn from")
    reader = _reader(options, backing, options.state)
    head = learn_head(*backing.pairs(), reader, options)
    return PreferenceReward(head if kept is None else save_head(head, kept), reader, options)


def _reader(options: PreferencesOptions, backing: Backing, state: FeatureState) -> FeatureReader:
    if backing.model is None or backing.processor is None:
        raise _missing("model")
    model: Any = backing.model()
    return FeatureReader(
        model,
        backing.processor(),
        backing.load_image if backing.load_image is not None else _no_pictures,
        max_length=options.max_length,
        batch_size=options.batch_size,
        state=state,
        frozen=backing.frozen,
        check=backing.check,
    )


def _missing(what: str) -> TrainingError:
    return TrainingError(f"reward preferences has no {what} here", param="preferences", code="no_head")


def _no_pictures(reference: str) -> Any:
    raise TrainingError("a picture is shown, and the reward was given no way to read it", code="bad_image")
