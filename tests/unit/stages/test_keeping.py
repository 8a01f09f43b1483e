"""A stage that keeps the language: its distance as a plain reference has it, none at first, less drift at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch.nn import functional

from noria.recipes import RecipeStage
from tests.unit.stages.material import stage, write_data
from train.data.encode import IGNORED
from train.data.sources import ImageLoader, read_all
from train.methods.policies import Applied, apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.stages.language import LanguageTask, measure

WEIGHT = 0.7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def task_of(master: Path, one: RecipeStage, folder: Path) -> tuple[LanguageTask, Applied]:
    """The stage's task in float32."""
    samples: Any = read_all(one.data, one.kind)
    load_image, processor = ImageLoader(named=True), load_processor(master)
    measured = measure(processor, samples, load_image, one, folder / "measured.json")
    torch.manual_seed(0)
    architecture = read_architecture(master)
    applied = apply_policies(load_policy(master, [], architecture, torch.float32), architecture, one.policies)
    return LanguageTask(applied, processor, samples, load_image, one, measured), applied


def moved(applied: Applied) -> None:
    """A LoRA that has learnt something."""
    with torch.no_grad():
        for name, parameter in applied.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)


def test_the_loss_is_the_answers_of_pictures_and_the_distance_of_the_rest(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    """Against two plain forwards over the same rows, row by row, to 1e-4 of a loss of some hundreds of nats."""
    task, applied = task_of(tiny_vlm, stage(data, "sft", keep_language=WEIGHT), tmp_path)
    moved(applied)
    batch = task.collate([(0,), (1,), (2,), (3,)])  # every third row has no picture
    loss, told = task.loss(applied.model, batch)
    plain, _ = task_of(tiny_vlm, stage(data, "sft"), tmp_path)
    expected, distances, tokens, learnt = 0.0, 0.0, 0, 0
    for number in range(4):
        row = plain.collate([(number,)])
        with torch.no_grad():
            now_TV = applied.model(**row["inputs"]).logits[0].log_softmax(-1)
            with applied.reference():
                before_TV = applied.model(**row["inputs"]).logits[0].log_softmax(-1)
        if number % 3:
            expected += float(
                functional.nll_loss(now_TV[:-1], row["labels"][0, 1:], ignore_index=IGNORED, reduction="sum")
            )
            learnt += int((row["labels"][0, 1:] != IGNORED).sum())
        else:
            distances += float((before_TV.exp() * (before_TV - now_TV)).sum())
            tokens += len(now_TV)
    assert distances > 0.01
    assert float(loss.detach()) == pytest.approx(expected + WEIGHT * distances, abs=1e-4 * expected)
    assert told["language_kl"] == pytest.approx(distances / tokens, rel=1e-3)
    assert batch["items"] == learnt + tokens


def test_before_the_first_step_there_is_no_distance_and_no_gradient(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    task, applied = task_of(tiny_vlm, stage(data, "sft", keep_language=WEIGHT), tmp_path)
    loss, told = task.loss(applied.model, task.collate([(0,), (3,)]))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5) and told["language_kl"] == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-5 for p in applied.model.parameters())


def test_what_keeps_the_language_drifts_less(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """The same rows of pictures learnt at the same rate: with keeping, text is predicted more as before."""
    drift: dict[float, float] = {}
    for weight in (1e-6, 10.0):
        one = stage(data, "sft", keep_language=weight, modules={"language_model": {"policy": "lora", "rank": 4}})
        task, applied = task_of(tiny_vlm, one, tmp_path)
        optimizer = torch.optim.AdamW(task.groups(applied.model), lr=1e-2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(12):
            loss, told = task.loss(applied.model, task.collate([(0,), (1,), (2,), (3,)]))
            optimizer.zero_grad()
            (loss / 10).backward()
            optimizer.step()
        drift[weight] = told["language_kl"]
    assert drift[10.0] < 0.5 * drift[1e-6]
