"""Log-probabilities of answers under the policy, by TRL's fused output layer, at the answers' own tokens only.

Comes in: a transformers model with TRL's fused head, micro-batches. Goes out: log-probabilities and entropies.
Must not import `serve`.

Two things stand in the model's way of computing. The hidden states that its output layer gets are those at the places
of a `Layout`: no row of the vocabulary is multiplied for a prompt's token. And what the frozen tower and aligner make
of a micro-batch's pictures is kept, since the reference and every further pass over the batch need the same.

Shapes: R rows, T tokens, B answers, C tokens of the longest answer, D hidden numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from noria.errors import TrainingError
from train.methods.grpo.layout import Layout

_READ = ("pooler_output", "deepstack_features")  # what transformers' models read of their image features


class AnswerForward:
    """Runs a model (not wrapped) whose forward has TRL's `fused_lm_head`."""

    def __init__(self, model: Any, image_id: int) -> None:
        self._model = model
        self._image_id = image_id
        self._now: _Now | None = None
        self._compute = model.model.get_image_features
        model.model.get_image_features = self._image_features
        model.model.register_forward_hook(self._gather)

    def __call__(
        self, layout: Layout, features: dict[str, Any], names: str, *, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, C) log-probabilities of the answers' tokens in nats, at TRL's temperature, and entropies; 0 on padding.

        `features` keeps what was made of the pictures, from one call to the next; `names` says whose rows these are.
        Raises TrainingError where the placeholders of the prompts are not as many as the tower's features.
        """
        labels_BC = layout.ids_BC.masked_fill(layout.mask_BC == 0, -100)
        labels = torch.nn.functional.pad(labels_BC, (1, 0), value=-100)  # the head predicts the next token
        tokens = int((layout.inputs["input_ids"] == self._image_id).sum())
        if "pixel_values" not in layout.inputs:
            _require_places(tokens, 0, names)
        self._now = _Now(layout.places_BC, features, tokens, names)
        try:
            outputs = self._model(**layout.inputs, labels=labels, fused_lm_head=True)
        finally:
            self._now = None
        return outputs.log_probs, outputs.entropy if entropy else None

    def _gather(self, module: Any, args: Any, output: Any) -> Any:
        """The backbone's hidden states at the places (B, C + 1, D); the last is nobody's, the head leaves it out."""
        if self._now is not None:
            picked = output.last_hidden_state.flatten(0, 1)[self._now.places_BC]
            output.last_hidden_state = torch.cat([picked, picked[:, -1:]], dim=1)
        return output

    def _image_features(self, *args: Any, **kwargs: Any) -> Any:
        if self._now is None:
            return self._compute(*args, **kwargs)
        if "made" not in self._now.features:
            with torch.no_grad():
                made = self._compute(*args, **kwargs)
            parts = [made.pooler_output] if isinstance(made.pooler_output, torch.Tensor) else made.pooler_output
            _require_places(self._now.tokens, sum(part.numel() // part.shape[-1] for part in parts), self._now.names)
            self._now.features["made"] = SimpleNamespace(**{name: getattr(made, name, None) for name in _READ})
        return self._now.features["made"]


@dataclass(frozen=True)
class _Now:
    """The call under way. `tokens` is its number of pictures' tokens."""

    places_BC: torch.Tensor
    features: dict[str, Any]
    tokens: int
    names: str


def _require_places(tokens: int, features: int, names: str) -> None:
    if tokens != features:
        raise TrainingError(
            f"{names}: the engine's prompts have {tokens} tokens of pictures, the trainer's tower and aligner give "
            f"{features}: engine and trainer prepare pictures differently",
            code="image_tokens",
        )
