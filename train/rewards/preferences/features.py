"""What the frozen model makes of a whole conversation: one vector.

Comes in: a model, its processor, conversations. Goes out: features, or why there are none. Must not import `serve`.

The states are the language model's last hidden ones, behind the final norm, just as the output layer reads them:
- `last`: at the last token of the answer: the end of its turn, where the model has read all of it and that it ended;
  or, of an answer that its limit of tokens cut, the last token of its text;
- `mean`: their mean over the answer's tokens, the end of its turn among them;
- `both`: the two, one after the other.

Shapes: B conversations in a forward, T tokens of the longest, D features (hidden size, or twice that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from noria.errors import TrainingError
from noria.records import Json, Pair, image_references
from noria.rewards import FeatureState
from train.data.collate import pad
from train.data.encode import IGNORED, Encoded, Encoder
from train.data.render import is_readable
from train.data.samples import LoadImage
from train.data.samples import Sample as EncodedSample
from train.rewards.protocol import Failure, Sample

TOO_LONG = Failure("too long")
NO_TOKENS = Failure("cannot be encoded")
NOT_FINITE = Failure("not finite")
UNREADABLE = Failure("unreadable")


@dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it. `cut`: its limit of tokens ended it; `captured`: the prompt is a user's."""

    messages: Sequence[Json]
    text: str
    cut: bool = False
    captured: bool = False

    @classmethod
    def of(cls, sample: Sample) -> Answered:
        """A sampled answer."""
        return cls(sample.prompt, sample.text, sample.cut)

    @classmethod
    def sides(cls, pair: Pair) -> tuple[Answered, Answered]:
        """The chosen and the rejected answer of a pair."""
        chosen = cls(pair.messages, pair.chosen, pair.chosen_cut, captured=True)
        return chosen, cls(pair.messages, pair.rejected, pair.rejected_cut, captured=True)


class FeatureReader:
    """Runs conversations through a model that is not changed by it.

    `frozen` is entered around each forward (see `Backing.frozen`); `check` is called before each and may raise to stop.
    Raises TrainingError for a model that has no body under its output layer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        load_image: LoadImage,
        *,
        max_length: int,
        batch_size: int,
        state: FeatureState = "last",
        frozen: Callable[[], AbstractContextManager[Any]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if model.base_model is model:
            raise TrainingError(f"{type(model).__name__} has no body to read features from", code="no_features")
        self._model = model
        self._encoder = Encoder(processor, load_image, turns="last")
        self._max_length = max_length
        self._batch_size = batch_size
        self.state: FeatureState = state
        self._frozen = frozen
        self._check = check

    def read(self, conversations: Sequence[Answered]) -> list[torch.Tensor | Failure]:
        """(D,) in float64 on the CPU for each; a failure for one that is too long or cannot be encoded."""
        found: list[torch.Tensor | Failure] = [NO_TOKENS] * len(conversations)
        for start in range(0, len(conversations), self._batch_size):
            self._check()
            batch: list[tuple[int, Encoded]] = []
            for at, one in enumerate(conversations[start : start + self._batch_size], start):
                encoded = self._encoded(one)
                if isinstance(encoded, Failure):
                    found[at] = encoded
                else:
                    batch.append((at, encoded))
            if batch:
                states_BD = self._forward([encoded for _, encoded in batch])
                for (at, _), state_D in zip(batch, states_BD, strict=True):
                    found[at] = state_D if torch.isfinite(state_D).all() else NOT_FINITE
        return found

    def _encoded(self, one: Answered) -> Encoded | Failure:
        if one.captured and not is_readable(one.messages):  # what a user named is never fetched
            return UNREADABLE
        messages = (*one.messages, {"role": "assistant", "content": one.text})
        try:
            encoded = self._encoder.encode(EncodedSample(messages, image_references(messages), "sample", one.cut))
        except TrainingError as error:  # a picture that cannot be read, a part that is neither text nor picture
            return Failure(error.code)
        if encoded is None:
            return NO_TOKENS
        return encoded if len(encoded) <= self._max_length else TOO_LONG

    def _forward(self, batch: Sequence[Encoded]) -> torch.Tensor:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device) for name, value in pad(batch, self._encoder.pad_id).items()}
        answer_BT = inputs.pop("labels") != IGNORED
        with torch.no_grad(), self._frozen(), evaluating(self._model):
            hidden_BTD = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        last_B = inputs["attention_mask"].sum(1) - 1
        last_BD = hidden_BTD[torch.arange(len(batch), device=device), last_B].double()
        if self.state == "last":
            return last_BD.cpu()
        mean_BD = (hidden_BTD.double() * answer_BT[:, :, None]).sum(1) / answer_BT.sum(1, keepdim=True)
        return mean_BD.cpu() if self.state == "mean" else torch.cat([last_BD, mean_BD], dim=1).cpu()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
