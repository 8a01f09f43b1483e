"""The pair methods besides DPO, trained: each goes down its own loss, and what is frozen stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from noria.methods.table import PreferenceMethod
from noria.settings import TrainSettings
from tests.unit.preferences.material import LORA, load_image, settings, text_pairs
from train.methods.preferences.method import train_method
from train.methods.preferences.steps import Step

FULL = {"aligner": {"policy": "full", "learning_rate": 1e-3}, **LORA}


@pytest.mark.parametrize(
    ("method", "more", "first"),
    [
        ("dpo", {"loss_type": "hinge"}, 1.0),
        ("dpo", {"loss_type": "ipo"}, 25.0),  # (1 / (2 * 0.1))^2
        ("dpo", {"loss_type": "robust"}, math.log(2)),
        ("dpo", {"loss_type": "sigmoid_norm"}, math.log(2)),
        ("dpo", {"label_smoothing": 0.1}, math.log(2)),
        ("simpo", {}, None),
        ("orpo", {}, None),
        ("cpo", {}, None),
        ("mpo", {"generation_weight": 0.0}, 0.8 * math.log(2) + 0.2 * 2 * math.log(2)),
    ],
)
def test_a_method_goes_down_its_loss(
    tiny_vlm: Path, tmp_path: Path, method: PreferenceMethod, more: dict[str, Any], first: float | None
) -> None:
    """Where there is a reference the policy starts as it, which gives the first loss."""
    steps: list[Step] = []
    report = train_method(
        tiny_vlm,
        [],
        text_pairs(tiny_vlm, 4),
        load_image,
        tmp_path / "delta",
        settings(method, 4, micro_batch_size=2, **more),
        TrainSettings.model_validate({"modules": FULL if method in ("simpo", "mpo") else LORA}).policies(),
        on_step=steps.append,
        check=lambda: None,
        dtype=torch.float32,
    )
    if first is not None:
        assert steps[0].loss == pytest.approx(first, rel=1e-5)
        assert steps[0].margin == pytest.approx(0.0, abs=1e-5)
    assert steps[-1].loss < steps[0].loss
    assert steps[-1].margin is not None
    assert steps[0].margin is not None
    assert steps[-1].margin > steps[0].margin
    assert all(math.isfinite(step.grad_norm) and step.grad_norm > 0 for step in steps)
    assert (report.steps, report.learnt_from) == (3, {"pairs": 4})
    assert report.frozen["vision_tower"].startswith("sha256:")


@pytest.mark.parametrize(("method", "asked"), [("simpo", 0), ("orpo", 0), ("cpo", 0), ("dpo", 2), ("mpo", 2)])
def test_one_model_is_loaded_and_is_its_own_reference_only_where_the_method_has_one(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: PreferenceMethod, asked: int
) -> None:
    """From the checkpoint to the delta, with weights in full, where a reference is run before the first step.

    `asked` forwards without gradients: none, or one for each of the two micro-batches.
    """
    loaded: list[Path] = []
    with_gradients: list[bool] = []
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def watched(kind: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(Path(path))
        model = load(kind, path, *args, **kwargs)
        model.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(watched))
    train_method(
        tiny_vlm,
        [],
        text_pairs(tiny_vlm, 4),
        load_image,
        tmp_path / "delta",
        settings(method, 4, micro_batch_size=2),
        TrainSettings.model_validate({"modules": FULL}).policies(),
        on_step=lambda step: None,
        check=lambda: None,
        dtype=torch.float32,
    )
    assert loaded == [tiny_vlm]
    assert with_gradients == [False] * asked + [True] * 6
