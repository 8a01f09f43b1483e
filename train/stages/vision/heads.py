"""Heads over the tower's patches: a class for each label of a picture, and for each patch an object and its box.

Comes in: `Patches` and what is true of the pictures. Goes out: a summed loss and figures. The heads are thrown away
after the stage, so they are small: what they need must be in the tower's vectors. Must not import `serve`.

- A label's class: cross-entropy over patches pooled by a learnt attention, one query a label.
- Objects, as FCOS does it without a pyramid (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a patch whose centre
  lies in a box has the box's class (the smallest box's where several meet), the others are background; a patch of an
  object tells the box's four distances from its centre, learnt by GIoU (Rezatofighi et al. 2019,
  https://arxiv.org/abs/1902.09630) and L1.
Shape suffixes: B pictures, P patches of all of them, D the tower's width, K classes, O objects of one picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from train.stages.vision.views import Patches

BACKGROUND = 0
_BACKGROUND_WEIGHT = 0.25  # most patches are background
_IGNORED = -100


@dataclass(frozen=True)
class Vocabulary:
    """What the heads tell apart: the values of each label, in order, and the classes of objects."""

    labels: Mapping[str, tuple[str, ...]]
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """What is true of a batch.

    `classes` maps a label to (B,) class numbers, -100 where a picture has none; `boxes` are (O, 4) x0 y0 x1 y1 in 0..1
    for each picture and `kinds` (O,) their classes from 1, or None for a picture of which nobody said what is where.
    """

    classes: dict[str, torch.Tensor]
    boxes: list[torch.Tensor | None]
    kinds: list[torch.Tensor | None]


class Heads(nn.Module):
    """Small heads over patches of one width."""

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(max(1, len(vocabulary.labels)), width) * width**-0.5)
        self.labels = nn.ModuleList(nn.Linear(2 * width, len(values)) for values in vocabulary.labels.values())
        objects = len(vocabulary.objects)
        self.kind = nn.Linear(width, 1 + objects) if objects else None
        self.box = nn.Linear(width, 4) if objects else None

    def forward(self, patches: Patches, truth: Truth) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss summed over pictures, and figures: accuracy of each label, of objects, and their boxes' IoU."""
        features_PD = self.norm(patches.features_PD.float())
        loss, figures = self._of_labels(features_PD, patches, truth)
        if self.kind is not None and any(one is not None for one in truth.boxes):
            more, told = self._of_objects(features_PD, patches, truth)
            loss, figures = loss + more, {**figures, **told}
        return loss, figures

    def _of_labels(
        self, features_PD: torch.Tensor, patches: Patches, truth: Truth
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = features_PD.sum() * 0.0
        figures: dict[str, float] = {}
        told_B = sum(((truth.classes[label] != _IGNORED).float() for label in truth.classes), start=torch.zeros(()))
        for number, (label, head) in enumerate(zip(self.vocabulary.labels, self.labels, strict=True)):
            classes_B = truth.classes[label]
            known_B = classes_B != _IGNORED
            if not bool(known_B.any()):
                continue
            logits_BK = head(_pooled(features_PD, patches.picture_P, self.queries[number], len(classes_B)))
            loss_B = functional.cross_entropy(logits_BK, classes_B, ignore_index=_IGNORED, reduction="none")
            loss = loss + (loss_B / torch.as_tensor(told_B, device=loss_B.device).clamp(min=1)).sum()
            figures[f"accuracy/{label}"] = float((logits_BK.argmax(-1) == classes_B)[known_B].float().mean())
        return loss, figures

    def _of_objects(
        self, features_PD: torch.Tensor, patches: Patches, truth: Truth
    ) -> tuple[torch.Tensor, dict[str, float]]:
        assert self.kind is not None and self.box is not None  # noqa: S101 - the caller asked
        loss = features_PD.sum() * 0.0
        right, seen, overlap, objects = 0.0, 0, 0.0, 0
        for number, (boxes, kinds) in enumerate(zip(truth.boxes, truth.kinds, strict=True)):
            if boxes is None or kinds is None:
                continue
            mine = patches.picture_P == number
            centres, features = patches.centres_P2[mine], features_PD[mine]
            kind_P, box_P4 = assign(centres, boxes, kinds)
            logits = self.kind(features)
            weight = torch.where(kind_P == BACKGROUND, _BACKGROUND_WEIGHT, 1.0)
            each = functional.cross_entropy(logits, kind_P, reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
            positive = kind_P != BACKGROUND
            right += float((logits.argmax(-1) == kind_P).float().sum())
            seen += len(kind_P)
            if bool(positive.any()):
                told = _corners(centres[positive], functional.softplus(self.box(features[positive])))
                true = box_P4[positive]
                giou, iou = generalised_iou(told, true)
                loss = loss + (1 - giou).mean() + functional.l1_loss(told, true)
                overlap += float(iou.detach().sum())
                objects += int(positive.sum())
        figures = {"accuracy/patches": right / max(1, seen)}
        return loss, {**figures, "iou": overlap / objects} if objects else figures


def assign(
    centres_P2: torch.Tensor, boxes_O4: torch.Tensor, kinds_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each patch's class (P,) and box (P, 4): of the smallest box that holds its centre, else background.

    An object that holds no patch's centre gets the patch nearest to its own centre.
    """
    count = len(centres_P2)
    kind_P = torch.full((count,), BACKGROUND, dtype=torch.long, device=centres_P2.device)
    box_P4 = torch.zeros(count, 4, device=centres_P2.device)
    areas_O = (boxes_O4[:, 2] - boxes_O4[:, 0]) * (boxes_O4[:, 3] - boxes_O4[:, 1])
    for number in areas_O.argsort(descending=True).tolist():
        box = boxes_O4[number]
        inside = ((centres_P2 >= box[:2]) & (centres_P2 <= box[2:])).all(-1)
        if not bool(inside.any()):
            middle = (box[:2] + box[2:]) / 2
            inside[((centres_P2 - middle) ** 2).sum(-1).argmin()] = True
        kind_P[inside] = kinds_O[number]
        box_P4[inside] = box
    return kind_P, box_P4


def generalised_iou(told_N4: torch.Tensor, true_N4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GIoU and IoU of boxes x0 y0 x1 y1, pair by pair."""
    low, high = torch.maximum(told_N4[:, :2], true_N4[:, :2]), torch.minimum(told_N4[:, 2:], true_N4[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(one[:, 2:] - one[:, :2]).clamp(min=0).prod(-1) for one in (told_N4, true_N4)]
    union = (areas[0] + areas[1] - shared).clamp(min=1e-9)
    around_low, around_high = (
        torch.minimum(told_N4[:, :2], true_N4[:, :2]),
        torch.maximum(told_N4[:, 2:], true_N4[:, 2:]),
    )
    around = (around_high - around_low).prod(-1).clamp(min=1e-9)
    iou = shared / union
    return iou - (around - union) / around, iou


def _corners(centres_N2: torch.Tensor, distances_N4: torch.Tensor) -> torch.Tensor:
    return torch.cat([centres_N2 - distances_N4[:, :2], centres_N2 + distances_N4[:, 2:]], dim=-1)


def _pooled(features_PD: torch.Tensor, picture_P: torch.Tensor, query_D: torch.Tensor, pictures: int) -> torch.Tensor:
    """(B, 2 D): the mean of a picture's patches, and their mean weighted by softmax of their product with the query."""
    rows = []
    for number in range(pictures):
        mine_ND = features_PD[picture_P == number]
        weights_N = torch.softmax(mine_ND @ query_D, dim=0)
        rows.append(torch.cat([mine_ND.mean(0), weights_N @ mine_ND]))
    return torch.stack(rows)
