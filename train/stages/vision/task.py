"""Stage `vision` as a task: pictures with labels and boxes in, the tower's gradients out.

Comes in: samples, a model whose policies are applied, its processor. Goes out: a `Task` for the trainer.
Must not import `serve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from noria.errors import TrainingError
from noria.recipes import RecipeStage
from noria.records import Json
from train.data.samples import Box, LoadImage, VisionSample
from train.methods.policies import Applied
from train.stages.order import Plan, Unit, plan
from train.stages.vision.heads import Heads, Truth, Vocabulary
from train.stages.vision.views import Views, Window

HEAD_RATE = 1e-3
_SEEN = 0.25  # the least share of a box that the tower must see for it to count
_UNKNOWN = -100


class LabelledTask(ABC):
    """What stages over pictures with labels share: their batches, of which an item is a picture.

    A kind of stage adds the model, which tells what a batch costs, and a report.
    """

    def __init__(
        self,
        applied: Applied,
        processor: Any,
        samples: Sequence[VisionSample],
        load_image: LoadImage,
        stage: RecipeStage,
    ) -> None:
        self._samples = samples
        self._load_image = load_image
        self._applied = applied
        self._views = Views(applied.model, applied.architecture, processor)
        self._stage = stage
        self.vocabulary = vocabulary(samples)
        self.plan: Plan = plan(stage, range(len(samples)))
        self.model = self._model(processor)

    @abstractmethod
    def _model(self, processor: Any) -> nn.Module:
        """What is called with pixels and truth, and gives the loss summed over pictures, and figures."""

    @abstractmethod
    def report(self) -> Json:
        """What the stage was about, for its manifest."""

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """The groups of the applied policies."""
        return self._applied.groups

    def collate(self, units: list[Unit]) -> dict[str, Any]:
        """Pixels and what is true of them."""
        samples = [self._samples[number] for unit in units for number in unit]
        pictures = [self._load_image(sample.image) for sample in samples]
        return {
            "pixels": self._views.pixels(pictures),
            "truth": truth(samples, [self._views.window(one) for one in pictures], self.vocabulary),
            "items": len(samples),
            "tokens": len(samples),
            "sources": [sample.source for sample in samples],
        }

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed over pictures."""
        total, figures = model(batch["pixels"], batch["truth"])
        return total, figures


class VisionTask(LabelledTask):
    """The tower under heads. `model` holds both, so that one optimiser and one checkpoint do."""

    def _model(self, processor: Any) -> nn.Module:
        return TowerWithHeads(self._applied.model, self._views, Heads(self._views.width, self.vocabulary))

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """The tower's groups, and one of the heads."""
        heads = [p for name, p in model.named_parameters() if ".heads." in f".{name}"]
        rate = self._stage.head_learning_rate or HEAD_RATE
        return [*super().groups(model), {"params": heads, "lr": rate, "weight_decay": 0.0}]

    def report(self) -> Json:
        """What the heads told apart."""
        told = {label: list(values) for label, values in self.vocabulary.labels.items()}
        return {"labels": told, "words": list(self.vocabulary.words)}


class TowerWithHeads(nn.Module):
    """A whole model of which only the tower runs, and the heads."""

    def __init__(self, model: Any, views: Views, heads: Heads) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self._views = views

    def forward(
        self, pixels: Mapping[str, torch.Tensor], true: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The summed loss and figures, as `Heads` tells them."""
        loss, figures = self.heads(self._views.patches(pixels), Truth(true["classes"], true["boxes"], true["words"]))
        return loss, figures


def vocabulary(samples: Sequence[VisionSample]) -> Vocabulary:
    """Every label with at least two values, and every word of boxes' labels.

    Raises TrainingError when there is nothing to learn.
    """
    values: dict[str, set[str]] = defaultdict(set)
    words: set[str] = set()
    for number in range(len(samples)):
        sample = samples[number]
        for label, value in sample.labels.items():
            values[label].add(value)
        words |= {word for box in sample.boxes for word in box.label.split()}
    labels = {label: tuple(sorted(found)) for label, found in sorted(values.items()) if len(found) > 1}
    if not labels and not words:
        raise TrainingError(
            "no label of the data has two values and there is no box: there is nothing to learn", code="no_data"
        )
    return Vocabulary(labels, tuple(sorted(words)))


def truth(samples: Sequence[VisionSample], windows: Sequence[Window], known: Vocabulary) -> dict[str, Any]:
    """`Truth` as plain containers, which trainers can move: `classes`, `boxes`, `words`."""
    classes = {
        label: torch.tensor([values.index(one.labels[label]) if label in one.labels else _UNKNOWN for one in samples])
        for label, values in known.labels.items()
    }
    seen = [
        [(box.label.split(), part) for box in sample.boxes if (part := _through(box, window)) is not None]
        for sample, window in zip(samples, windows, strict=True)
    ]
    most = max(len(boxes) for boxes in seen)
    numbers = {word: number for number, word in enumerate(known.words)}
    nowhere = (0.0, 0.0, 0.0, 0.0)
    corners = [[part for _, part in found] + [nowhere] * (most - len(found)) for found in seen]
    marks = [
        (picture, place, numbers[word])
        for picture, found in enumerate(seen)
        for place, (words, _) in enumerate(found)
        for word in words
    ]
    boxes_BO4 = torch.tensor(corners).reshape(len(samples), most, 4)
    words_BOW = torch.zeros(len(samples), most, len(numbers))
    if marks:
        words_BOW[tuple(torch.tensor(marks).unbind(1))] = 1.0
    return {"classes": classes, "boxes": boxes_BO4, "words": words_BOW}


def _through(box: Box, window: Window) -> tuple[float, float, float, float] | None:
    """The box in the window's own shares, cut at its edge; None where too little of it is seen."""
    x0, y0, x1, y1 = window
    left, right = _clip((box.x0 - x0) / (x1 - x0)), _clip((box.x1 - x0) / (x1 - x0))
    top, bottom = _clip((box.y0 - y0) / (y1 - y0)), _clip((box.y1 - y0) / (y1 - y0))
    whole = (box.x1 - box.x0) * (box.y1 - box.y0) / ((x1 - x0) * (y1 - y0))
    if whole <= 0 or (right - left) * (bottom - top) < _SEEN * whole:
        return None
    return left, top, right, bottom


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))
