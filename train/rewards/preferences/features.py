"""What the frozen model makes of a whole conversation: one vector.

Comes in: a model, its processor, conversations. Goes out: features, or why there are none. Must not import `serve`.

The feature is the last hidden state, behind the final norm, just as the output layer reads it, at the last token of the
answer: the end of its turn, where the model has read all of it and that it ended; or, of an answer that its limit of
tokens cut, the last token of its text.

Shapes: B conversations in a forward, T tokens of the longest, K positions kept, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from noria.errors import TrainingError
from noria.records import BLOB_SCHEME, Json, Pair
from train.data.collate import pad
from train.data.encode import Encoded, Encoder
from train.data.samples import LoadImage, references
from train.data.samples import Sample as EncodedSample
from train.rewards.protocol import Failure, Sample

STATE = "last hidden state behind the final norm, at the answer's last token (its end of turn, unless it was cut)"
TOO_LONG = Failure("too long")
NO_TOKENS = Failure("cannot be encoded")


@dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it. `cut`: its limit of tokens ended it."""

    messages: Sequence[Json]
    text: str
    cut: bool = False

    @classmethod
    def of(cls, sample: Sample) -> Answered:
        """A sampled answer."""
        return cls(sample.prompt, sample.text, sample.cut)

    @classmethod
    def sides(cls, pair: Pair) -> tuple[Answered, Answered]:
        """The chosen and the rejected answer of a pair."""
        chosen = cls(pair.messages, pair.chosen, pair.chosen_cut)
        return chosen, cls(pair.messages, pair.rejected, pair.rejected_cut)


class FeatureReader:
    """Runs conversations through a model that is not changed by it.

    `frozen` is entered around each forward (see `Backing.frozen`); `check` is called before each and may raise to stop.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        load_image: LoadImage,
        *,
        max_length: int,
        batch_size: int,
        frozen: Callable[[], AbstractContextManager[Any]] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._encoder = Encoder(processor, lambda one: load_image(one.removeprefix(BLOB_SCHEME)), turns="last")
        self._max_length = max_length
        self._batch_size = batch_size
        self._frozen = frozen
        self._check = check
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

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
                    found[at] = state_D if torch.isfinite(state_D).all() else Failure("not finite")
        return found

    def _encoded(self, one: Answered) -> Encoded | Failure:
        messages = (*one.messages, {"role": "assistant", "content": one.text})
        try:
            encoded = self._encoder.encode(EncodedSample(messages, references(messages), "sample", one.cut))
        except TrainingError as error:  # a picture that cannot be read, a part that is neither text nor picture
            return Failure(error.code)
        if encoded is None:
            return NO_TOKENS
        return encoded if len(encoded) <= self._max_length else TOO_LONG

    def _forward(self, batch: Sequence[Encoded]) -> torch.Tensor:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device) for name, value in pad(batch, self._encoder.pad_id).items()}
        inputs.pop("labels")
        last_B = inputs["attention_mask"].sum(1) - 1
        keep_K, place_B = torch.unique(last_B, return_inverse=True)
        if self._keeps:
            inputs["logits_to_keep"] = keep_K
        with torch.no_grad(), self._frozen(), evaluating(self._model), _output_inputs(self._model) as seen:
            self._model(**inputs, use_cache=False)
        hidden_BKD = seen[-1]
        rows_B = torch.arange(len(batch), device=device)
        return hidden_BKD[rows_B, place_B if self._keeps else last_B].double().cpu()


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


@contextmanager
def _output_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the output layer is given inside. Raises TrainingError for a model without one."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise TrainingError(f"{type(model).__name__} has no output layer to read features at", code="no_features")
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
