"""Heads over the tower's patches: a class for each label of a picture, and for each patch an object's words and box.

Comes in: `Patches` and what is true of the pictures. Goes out: a summed loss and figures. The heads are thrown away
after the stage, so they are small: what they need must be in the tower's vectors. Must not import `serve`.

- A label's class: cross-entropy over the mean of the picture's patches; a picture's labels are summed.
- Objects, as FCOS does it without a pyramid (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a patch whose centre
  lies in a box has the words of the box's label (the smallest box's where several meet), the others have none; each
  word is a sigmoid of its own, so that `large red circle` teaches three facts and a meeting never seen is known by its
  words. A patch of an object tells the box's four distances from its centre, learnt by GIoU (Rezatofighi et al. 2019,
  https://arxiv.org/abs/1902.09630) and L1.
Shape suffixes: B pictures, N patches of the one that has most, P patches of all, D the tower's width, K classes,
O boxes of the picture that has most, W words, F patches that show an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from train.stages.vision.views import Patches

_IGNORED = -100
# A patch knows few of the words: heads that begin by saying none (FCOS does the same) need not learn that first.
_RARE = -4.0
# Of the words beside a label: grown on 36 patches with a quarter of the sum over them, which is 9 times their mean.
_WORDS_WEIGHT = 9.0


@dataclass(frozen=True)
class Vocabulary:
    """What the heads tell apart: the values of each label, in order, and the words of objects."""

    labels: Mapping[str, tuple[str, ...]]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """What is true of a batch.

    `classes` maps a label to (B,) class numbers, -100 where a picture has none. `boxes_BO4` are x0 y0 x1 y1 in 0..1,
    zeros behind a picture's last; a picture without any is one of which nobody said what is where. `words_BOW` are 1
    for the words of each box's label, else 0.
    """

    classes: Mapping[str, torch.Tensor]
    boxes_BO4: torch.Tensor
    words_BOW: torch.Tensor


class Heads(nn.Module):
    """Small heads over patches of one width. They run in float32, whatever the tower does."""

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.norm = nn.LayerNorm(width)
        self.labels = nn.ModuleList(nn.Linear(width, len(values)) for values in vocabulary.labels.values())
        self.words = nn.Linear(width, len(vocabulary.words)) if vocabulary.words else None
        self.box = nn.Linear(width, 4) if vocabulary.words else None
        if self.words is not None:
            nn.init.constant_(self.words.bias, _RARE)

    def forward(self, patches: Patches, truth: Truth) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss summed over pictures, and figures: accuracy of each label, of patches' words, and boxes' IoU."""
        with torch.autocast(patches.features_PD.device.type, enabled=False):
            dense = dense_patches(patches, len(truth.boxes_BO4))
            features_BND = self.norm(dense.features_BND.float())
            loss, figures = self._of_labels(features_BND, dense.there_BN, truth)
            if self.words is not None and truth.boxes_BO4.shape[1]:
                more, told = self._of_objects(features_BND, dense, truth)
                loss, figures = loss + more, {**figures, **told}
        return loss, figures

    def _of_labels(
        self, features_BND: torch.Tensor, there_BN: torch.Tensor, truth: Truth
    ) -> tuple[torch.Tensor, dict[str, float]]:
        mean_BD = (features_BND * there_BN[..., None]).sum(1) / there_BN.sum(1, keepdim=True)
        loss = mean_BD.sum() * 0.0
        figures: dict[str, float] = {}
        for label, head in zip(self.vocabulary.labels, self.labels, strict=True):
            classes_B = truth.classes[label]
            known_B = classes_B != _IGNORED
            if not bool(known_B.any()):
                continue
            logits_BK = head(mean_BD)
            loss = loss + functional.cross_entropy(logits_BK, classes_B, ignore_index=_IGNORED, reduction="sum")
            figures[f"accuracy/{label}"] = float((logits_BK.argmax(-1) == classes_B)[known_B].float().mean())
        return loss, figures

    def _of_objects(
        self, features_BND: torch.Tensor, dense: DensePatches, truth: Truth
    ) -> tuple[torch.Tensor, dict[str, float]]:
        assert self.words is not None and self.box is not None  # noqa: S101 - the caller asked
        owner_BN = assign(dense.centres_BN2, dense.there_BN, truth.boxes_BO4)
        shows_BN = owner_BN >= 0
        asked_BN = dense.there_BN & shows_BN.any(1, keepdim=True)  # patches of pictures that have boxes
        picture_B1 = torch.arange(len(owner_BN), device=owner_BN.device)[:, None]
        true_BNW = truth.words_BOW[picture_B1, owner_BN.clamp(min=0)] * shows_BN[..., None]
        logits_BNW = self.words(features_BND)
        each_BN = functional.binary_cross_entropy_with_logits(logits_BNW, true_BNW, reduction="none").sum(-1)
        words = (each_BN * asked_BN / dense.there_BN.sum(1, keepdim=True)).sum()
        right_BN = ((logits_BNW > 0) == (true_BNW > 0.5)).all(-1)
        figures = {"accuracy/patches": float(right_BN[asked_BN].float().mean())} if bool(asked_BN.any()) else {}

        told_F4 = _corners(dense.centres_BN2[shows_BN], functional.softplus(self.box(features_BND[shows_BN])))
        true_F4 = truth.boxes_BO4[picture_B1, owner_BN.clamp(min=0)][shows_BN]
        giou_F, iou_F = generalised_iou(told_F4, true_F4)
        share_F = (shows_BN / shows_BN.sum(1, keepdim=True).clamp(min=1))[shows_BN]  # a picture's mean over its patches
        boxes = (((1 - giou_F) + (told_F4 - true_F4).abs().mean(-1)) * share_F).sum()
        if len(iou_F):
            figures["iou"] = float(iou_F.detach().mean())
        return _WORDS_WEIGHT * words + boxes, figures


@dataclass(frozen=True)
class DensePatches:
    """Patches picture by picture; `there_BN` is false behind a picture's last."""

    features_BND: torch.Tensor
    centres_BN2: torch.Tensor
    there_BN: torch.Tensor


def dense_patches(patches: Patches, pictures: int) -> DensePatches:
    """The same patches with one row a picture: reshaped where all have the same number in order, else laid out."""
    picture_P = patches.picture_P
    counts_B = torch.bincount(picture_P, minlength=pictures)
    most = int(counts_B.max())
    there_BN = torch.arange(most, device=picture_P.device) < counts_B[:, None]
    if len(picture_P) == pictures * most and bool((picture_P.diff() >= 0).all()):
        return DensePatches(
            patches.features_PD.view(pictures, most, -1), patches.centres_P2.view(pictures, most, 2), there_BN
        )
    order_P = picture_P.argsort(stable=True)
    rows = [patches.features_PD[order_P], patches.centres_P2[order_P]]
    laid = []
    for row in rows:
        empty = row.new_zeros(pictures, most, row.shape[-1])
        laid.append(empty.masked_scatter(there_BN[..., None], row))
    return DensePatches(laid[0], laid[1], there_BN)


def assign(centres_BN2: torch.Tensor, there_BN: torch.Tensor, boxes_BO4: torch.Tensor) -> torch.Tensor:
    """(B, N): the number of the smallest of the picture's boxes that holds a patch's centre, else -1.

    A box that holds no patch's centre gets the patch nearest to its own centre. Boxes without area are none.
    """
    low_BO2, high_BO2 = boxes_BO4[..., :2], boxes_BO4[..., 2:]
    real_BO = (high_BO2 > low_BO2).all(-1)
    centres_BN12 = centres_BN2[:, :, None]
    inside_BNO = ((centres_BN12 >= low_BO2[:, None]) & (centres_BN12 <= high_BO2[:, None])).all(-1)
    inside_BNO &= there_BN[..., None]
    far_BNO = ((centres_BN12 - ((low_BO2 + high_BO2) / 2)[:, None]) ** 2).sum(-1)
    far_BNO = far_BNO.masked_fill(~there_BN[..., None], torch.inf)
    nearest_BNO = functional.one_hot(far_BNO.argmin(1), far_BNO.shape[1]).transpose(1, 2).bool()
    held_BNO = (inside_BNO | (nearest_BNO & ~inside_BNO.any(1, keepdim=True))) & real_BO[:, None]
    area_BNO = (high_BO2 - low_BO2).prod(-1)[:, None].expand(held_BNO.shape).masked_fill(~held_BNO, torch.inf)
    return torch.where(held_BNO.any(-1), area_BNO.argmin(-1), -1)


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
