"""The stage that teaches the aligner words: its loss as plain code has it, who trains, who never runs, refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from noria.errors import SettingsError, TrainingError, UnsupportedModel
from noria.modules import ARCHITECTURES
from tests.unit.stages.material import stage, trained, write_data, write_rows
from train.data.sources import ImageLoader, read_all
from train.methods.policies import Applied, apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.stages.run import Listener, train_supervised
from train.stages.spec import StageRun
from train.stages.vision.words import WordsTask, aligner_path, embeddings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def words(data: Path, **more: Any) -> Any:
    return stage(data, "words", **more)


def task_of(master: Path, data: Path) -> tuple[WordsTask, Applied]:
    one = words(data)
    samples: Any = read_all(one.data, one.kind)
    architecture = read_architecture(master)
    applied = apply_policies(load_policy(master, [], architecture, torch.float32), architecture, one.policies)
    return WordsTask(applied, load_processor(master), samples, ImageLoader(named=True), one), applied


def test_the_loss_is_the_squared_distance_to_the_words_embeddings(tiny_vlm: Path, data: Path) -> None:
    """Patch by patch in plain Python over the same batch, to 1e-4 of the loss."""
    task, applied = task_of(tiny_vlm, data)
    batch = task.collate([(0,), (1,), (5,)])
    loss, told = task.loss(task.model, batch)
    model, tokenizer = applied.model, load_processor(tiny_vlm).tokenizer
    words_WH, nothing_H = embeddings(model, tokenizer, task.vocabulary.words)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=batch["pixels"]["pixel_values"], return_dict=True).pooler_output
    side = int(len(seen[0]) ** 0.5)
    expected = 0.0
    for picture, vectors in enumerate(seen):
        (x0, y0, x1, y1), word = (
            batch["truth"]["boxes"][picture, 0].tolist(),
            batch["truth"]["words"][picture, 0].argmax(),
        )
        inside = [
            x0 <= (patch % side + 0.5) / side <= x1 and y0 <= (patch // side + 0.5) / side <= y1
            for patch in range(side * side)
        ]
        assert any(inside) and not all(inside)
        for shown, vector in zip(inside, vectors, strict=True):
            true, weight = (words_WH[word], 1.0) if shown else (nothing_H, 0.15)
            expected += weight * float(((vector - true) ** 2).mean() / words_WH.var()) / len(vectors)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert batch["items"] == 3 and 0.0 <= told["accuracy/words"] <= 1.0


def test_it_learns_the_words_with_the_aligner_alone(
    tiny_vlm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model never runs, the tower does not change; after some steps each patch is nearest to its word."""

    def runs(self: Any, *args: Any, **more: Any) -> None:
        raise AssertionError("the language model ran")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", runs)
    one = words(data, steps=60, batch_size=12, micro_batch_size=12, modules={"aligner": {"learning_rate": 1e-2}})
    (tmp_path / "out").mkdir()
    told = train_supervised(StageRun(tiny_vlm, (), one, tmp_path / "out", dtype="float32"), Listener())
    assert set(told["frozen"]) == {"vision_tower", "language_model"}
    assert told["loss_last"] < 0.3 * told["loss_first"]
    assert told["task"]["words"] == ["blue", "green", "red"]
    assert told["curve"][-1]["accuracy/words"] > 0.9
    assert all("multi_modal_projector" in name for name in trained(tmp_path / "out"))


def test_a_word_of_several_tokens_is_their_mean_and_the_shorter_spelling_counts(tiny_vlm: Path, data: Path) -> None:
    _, applied = task_of(tiny_vlm, data)
    tokenizer, table = load_processor(tiny_vlm).tokenizer, applied.model.get_input_embeddings().weight.detach()
    long, short = "an unusually long label", "red"
    found_WH, _ = embeddings(applied.model, tokenizer, [long, short])
    for word, found_H in zip((long, short), found_WH, strict=True):
        spelt = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        torch.testing.assert_close(found_H, table[min(spelt, key=len)].mean(0))


def test_what_has_no_boxes_or_no_single_aligner_is_refused(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    rows = [{"image": str(data / "0.png"), "labels": {"colour": colour}} for colour in ("red", "blue")]
    write_rows(tmp_path / "labels.jsonl", rows)
    with pytest.raises(TrainingError, match="no box says a word"):
        task_of(tiny_vlm, tmp_path)
    several = [one for one in ARCHITECTURES if len([p for p in one.prefixes("aligner", "hf") if p.endswith(".")]) > 1]
    for architecture in several:
        with pytest.raises(UnsupportedModel, match="kind 'words' needs one"):
            aligner_path(architecture)
    with pytest.raises(SettingsError, match=r"modules\.vision_tower\.policy='full' contradicts kind='words'"):
        words(data, modules={"vision_tower": "full"})
