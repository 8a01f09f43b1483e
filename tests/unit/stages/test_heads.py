"""The heads of the vision stage: which patch has which object, boxes against a slow reference, every family's view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from noria.errors import TrainingError
from noria.modules import architecture_of
from tests.tiny_families import FAMILIES, build_tiny_family
from train.data.samples import Box, VisionSample
from train.stages.vision.heads import Heads, Truth, Vocabulary, assign, generalised_iou
from train.stages.vision.task import truth, vocabulary
from train.stages.vision.views import WHOLE_PICTURE, Patches, Views


def grid(side: int) -> torch.Tensor:
    middles = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def test_a_patch_has_the_smallest_box_around_its_centre() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.3, 0.3], [0.9, 0.9, 0.95, 0.95]])
    kind, box = assign(grid(4), boxes, torch.tensor([1, 2, 3]))
    assert kind.reshape(4, 4).tolist() == [[2, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 3]]
    assert torch.equal(box[0], boxes[1])
    assert torch.equal(box[15], boxes[2])  # it holds no centre: the nearest patch is its own


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


def test_the_heads_learn_what_the_patches_say() -> None:
    """Patches that carry the answer: labels, objects and boxes are all found."""
    torch.manual_seed(0)
    known = Vocabulary({"colour": ("blue", "red")}, ("square",))
    heads = Heads(8, known)
    features = torch.zeros(32, 8)
    features[:16, 0] = 2.0
    features[16:, 1] = 2.0
    features[5, 2] = features[20, 2] = 3.0
    patches = Patches(features, torch.arange(2).repeat_interleave(16), grid(4).repeat(2, 1))
    box = [torch.tensor([[0.25, 0.25, 0.5, 0.5]]), torch.tensor([[0.0, 0.25, 0.25, 0.5]])]
    true = Truth({"colour": torch.tensor([1, 0])}, list(box), [torch.tensor([1]), torch.tensor([1])])
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    first, _ = heads(patches, true)
    for _ in range(200):
        loss, figures = heads(patches, true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.1 * float(first)
    assert figures["accuracy/colour"] == figures["accuracy/patches"] == 1.0
    assert figures["iou"] > 0.8


def test_a_label_that_a_picture_lacks_has_no_loss() -> None:
    torch.manual_seed(0)
    known = Vocabulary({"colour": ("blue", "red"), "size": ("big", "small")}, ())
    heads = Heads(4, known)
    patches = Patches(torch.randn(8, 4), torch.arange(2).repeat_interleave(4), grid(2).repeat(2, 1))
    nothing: list[Any] = [None, None]
    lone = {"colour": torch.tensor([1, -100]), "size": torch.tensor([-100, -100])}
    loss, figures = heads(patches, Truth(lone, nothing, nothing))
    assert list(figures) == ["accuracy/colour"]
    both, _ = heads(patches, Truth({**lone, "size": torch.tensor([0, -100])}, nothing, nothing))
    assert float(both) != float(loss)
    loss.backward()
    assert heads.labels[1].weight.grad is None


def test_boxes_are_told_in_what_the_tower_sees() -> None:
    boxes = (Box("a", 0.25, 0.25, 0.5, 0.75), Box("b", 0.0, 0.0, 0.2, 1.0))
    known = vocabulary([VisionSample("x", {"colour": c}, boxes, "s:1") for c in ("red", "blue")])
    told = truth([VisionSample("x", {"colour": "red"}, boxes, "s:1")], [(0.25, 0.0, 0.75, 1.0)], known)
    assert told["classes"]["colour"].tolist() == [1]
    assert told["boxes"][0].tolist() == [[0.0, 0.25, 0.5, 0.75]]  # the other one is cut away
    assert told["kinds"][0].tolist() == [1]


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
