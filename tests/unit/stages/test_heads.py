"""The vision stage's heads: which patch has which object, the loss against a slow reference, every family's view."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from noria.errors import TrainingError
from noria.modules import architecture_of
from tests.tiny_families import FAMILIES, build_tiny_family
from train.data.samples import Box, VisionSample
from train.stages.vision.heads import Heads, Truth, Vocabulary, assign, dense_patches, generalised_iou
from train.stages.vision.task import truth, vocabulary
from train.stages.vision.views import WHOLE_PICTURE, Patches, Views


def grid(side: int) -> torch.Tensor:
    middles = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def test_a_patch_has_the_smallest_box_around_its_centre() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.3, 0.3], [0.9, 0.9, 0.95, 0.95], [0.0, 0.0, 0.0, 0.0]])
    owner = assign(grid(4)[None], torch.ones(1, 16, dtype=torch.bool), boxes[None])
    # The third holds no centre: the nearest patch is its own. The fourth is none.
    assert owner.reshape(4, 4).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [-1, -1, -1, -1], [-1, -1, -1, 2]]


def slow_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union - (around - union) / around, shared / union


def test_generalised_iou_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    low, size = torch.rand(2, 50, 2, generator=generator), torch.rand(2, 50, 2, generator=generator) + 0.01
    told, true = (torch.cat([low[n], low[n] + size[n]], dim=-1) for n in (0, 1))
    giou, iou = generalised_iou(told, true)
    expected = [slow_giou(a, b) for a, b in zip(told.tolist(), true.tolist(), strict=True)]
    torch.testing.assert_close(giou, torch.tensor([one[0] for one in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(iou, torch.tensor([one[1] for one in expected]), atol=1e-5, rtol=0)


def cross_entropy(logits: list[float], wanted: int) -> float:
    return math.log(sum(math.exp(one) for one in logits)) - logits[wanted]


def slow_owner(centre: list[float], centres: list[list[float]], boxes: list[list[float]]) -> int:
    """Of the boxes that hold this centre, or hold none and lie nearest to it, the smallest."""
    held = []
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        inside = [one for one in centres if x0 <= one[0] <= x1 and y0 <= one[1] <= y1]
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        mine = inside or [min(centres, key=lambda one: (one[0] - middle[0]) ** 2 + (one[1] - middle[1]) ** 2)]
        if centre in mine:
            held.append(((x1 - x0) * (y1 - y0), number))
    return min(held)[1] if held else -1


def slow_loss(heads: Heads, patches: Patches, samples: list[VisionSample]) -> float:
    """The heads' loss, one picture, patch and word at a time."""
    total = 0.0
    for number, sample in enumerate(samples):
        mine = patches.picture_P == number
        features, centres = heads.norm(patches.features_PD[mine]), patches.centres_P2[mine].tolist()
        for head, (label, values) in zip(heads.labels, heads.vocabulary.labels.items(), strict=True):
            if label in sample.labels:
                total += cross_entropy(head(features.mean(0)).tolist(), values.index(sample.labels[label]))
        if not sample.boxes or heads.words is None or heads.box is None:
            continue
        boxes = torch.tensor([[box.x0, box.y0, box.x1, box.y1] for box in sample.boxes]).tolist()
        of_boxes = []
        for centre, vector in zip(centres, features, strict=True):
            owner = slow_owner(centre, centres, boxes)
            known = sample.boxes[owner].label.split() if owner >= 0 else []
            for word, logit in zip(heads.vocabulary.words, heads.words(vector).tolist(), strict=True):
                wrong = -logit if word in known else logit
                total += 9 * math.log1p(math.exp(wrong)) / len(centres)
            if owner >= 0:
                reach = torch.nn.functional.softplus(heads.box(vector)).tolist()
                told = [centre[0] - reach[0], centre[1] - reach[1], centre[0] + reach[2], centre[1] + reach[3]]
                apart = sum(abs(a - b) for a, b in zip(told, boxes[owner], strict=True)) / 4
                of_boxes.append(1 - slow_giou(told, boxes[owner])[0] + apart)
        total += sum(of_boxes) / len(of_boxes)
    return total


SAMPLES = [
    VisionSample("a", {"colour": "red", "size": "big"}, (Box("big red ball", 0.1, 0.1, 0.6, 0.7),), "s:1"),
    VisionSample("b", {"colour": "blue"}, (Box("blue", 0, 0, 1, 0.5), Box("red ball", 0.3, 0.3, 0.31, 0.32)), "s:2"),
    VisionSample("c", {"size": "small"}, (), "s:3"),
]


@pytest.mark.parametrize("sides", [(3, 3, 3), (3, 2, 4)], ids=["alike", "of many sizes"])
@pytest.mark.parametrize("mixed", [False, True], ids=["in order", "mixed up"])
def test_the_loss_is_the_slow_one(sides: tuple[int, ...], mixed: bool) -> None:
    """Labels are summed, each word is a fact of its own, and pictures may differ in how many patches they have."""
    torch.manual_seed(0)
    picture = torch.arange(len(sides)).repeat_interleave(torch.tensor([side * side for side in sides]))
    patches = Patches(torch.randn(len(picture), 8), picture, torch.cat([grid(side) for side in sides]))
    if mixed:
        order = torch.randperm(len(picture))
        patches = Patches(patches.features_PD[order], picture[order], patches.centres_P2[order])
    heads = Heads(8, vocabulary(SAMPLES))
    told = truth(SAMPLES, [WHOLE_PICTURE] * 3, heads.vocabulary)
    loss, figures = heads(patches, Truth(told["classes"], told["boxes"], told["words"]))
    with torch.no_grad():
        assert float(loss) == pytest.approx(slow_loss(heads, patches, SAMPLES), abs=1e-4)
    assert set(figures) == {"accuracy/colour", "accuracy/size", "accuracy/patches", "iou"}


def test_patches_are_laid_out_with_their_gradient() -> None:
    features = torch.arange(5.0)[:, None].requires_grad_()
    laid = dense_patches(Patches(features, torch.tensor([1, 0, 1, 1, 0]), torch.rand(5, 2)), 2)
    assert laid.features_BND[..., 0].tolist() == [[1, 4, 0], [0, 2, 3]]
    assert laid.there_BN.tolist() == [[True, True, False], [True, True, True]]
    (laid.features_BND * torch.tensor([[[1.0], [2.0], [9.0]], [[3.0], [4.0], [5.0]]])).sum().backward()
    assert features.grad is not None
    assert features.grad.flatten().tolist() == [3, 1, 4, 5, 2]


def test_the_heads_learn_what_the_patches_say() -> None:
    """Patches that carry the answer: labels, words and boxes are all found."""
    torch.manual_seed(0)
    heads = Heads(8, Vocabulary({"colour": ("blue", "red")}, ("left", "red", "right", "square")))
    features = torch.zeros(32, 8)
    features[:16, 0] = 2.0
    features[16:, 1] = 2.0
    features[5, 2] = features[20, 2] = 3.0
    patches = Patches(features, torch.arange(2).repeat_interleave(16), grid(4).repeat(2, 1))
    box = torch.tensor([[[0.25, 0.25, 0.5, 0.5]], [[0.0, 0.25, 0.25, 0.5]]])
    words = torch.tensor([[[1.0, 1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 1.0]]])
    true = Truth({"colour": torch.tensor([1, 0])}, box, words)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    first, _ = heads(patches, true)
    for _ in range(200):
        loss, figures = heads(patches, true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(first.detach())
    assert figures["accuracy/colour"] == figures["accuracy/patches"] == 1.0
    assert figures["iou"] > 0.8


def test_a_label_that_a_picture_lacks_has_no_loss() -> None:
    torch.manual_seed(0)
    known = Vocabulary({"colour": ("blue", "red"), "size": ("big", "small")}, ())
    heads = Heads(4, known)
    patches = Patches(torch.randn(8, 4), torch.arange(2).repeat_interleave(4), grid(2).repeat(2, 1))
    nothing = (torch.zeros(2, 0, 4), torch.zeros(2, 0, 0))
    lone = {"colour": torch.tensor([1, -100]), "size": torch.tensor([-100, -100])}
    loss, figures = heads(patches, Truth(lone, *nothing))
    assert list(figures) == ["accuracy/colour"]
    both, _ = heads(patches, Truth({**lone, "size": torch.tensor([0, -100])}, *nothing))
    assert float(both) != float(loss)
    loss.backward()
    assert heads.labels[1].weight.grad is None


def test_boxes_are_told_in_what_the_tower_sees() -> None:
    boxes = (Box("a big one", 0.25, 0.25, 0.5, 0.75), Box("b", 0.0, 0.0, 0.2, 1.0))
    known = vocabulary([VisionSample("x", {"colour": c}, boxes, "s:1") for c in ("red", "blue")])
    assert known.words == ("a", "b", "big", "one")
    told = truth([VisionSample("x", {"colour": "red"}, boxes, "s:1")], [(0.25, 0.0, 0.75, 1.0)], known)
    assert told["classes"]["colour"].tolist() == [1]
    assert told["boxes"].tolist() == [[[0.0, 0.25, 0.5, 0.75]]]  # the other one is cut away
    assert told["words"].tolist() == [[[1, 0, 1, 1]]]


def test_data_that_says_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="no label of the data has two values"):
        vocabulary([VisionSample("x", {"colour": "red"}, (), "s:1")])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_shows_where_its_patches_lie(family: str, tmp_path: Path) -> None:
    """A patch's vector follows the pixels at its centre: change one corner, and the nearest patches move most."""
    folder = build_tiny_family(tmp_path / family, family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    views = Views(model, architecture_of(model.config.to_dict()), transformers.AutoProcessor.from_pretrained(folder))
    plain = Image.new("RGB", (32, 32), "white")
    other = plain.copy()
    other.paste((0, 0, 255), (24, 0, 32, 8))
    assert views.window(plain) == WHOLE_PICTURE
    with torch.no_grad():
        found = views.patches(views.pixels([plain, other]))
    first, second = (found.features_PD[found.picture_P == number] for number in (0, 1))
    centres = found.centres_P2[found.picture_P == 1]
    assert torch.equal(found.centres_P2[found.picture_P == 0], centres)
    assert len({tuple(one) for one in centres.tolist()}) == len(centres)
    moved = centres[(first - second).norm(dim=-1).argmax()]
    assert float(moved[0]) > 0.7
    assert float(moved[1]) < 0.3
    assert found.features_PD.shape[1] == views.width
