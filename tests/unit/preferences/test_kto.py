"""KTO from thumbs: whose answer stands with whose prompt, and a training from its first step to its delta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from noria.settings import TrainSettings
from tests.unit.preferences.material import LORA, kto_paper, load_image, settings, text_thumbs, token_logps
from train.data.pairs import TextThumb
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.methods.preferences.method import MethodReport, train_method
from train.methods.preferences.order import draw_order
from train.methods.preferences.steps import Step
from train.methods.preferences.thumbs import ThumbCollator


@pytest.fixture(scope="module")
def thumbs(tiny_vlm: Path) -> list[TextThumb]:
    return text_thumbs(tiny_vlm, 6)


def run(
    master: Path,
    thumbs: Sequence[TextThumb],
    out: Path,
    modules: Any = None,
    dtype: torch.dtype = torch.float32,
    **kto: Any,
) -> tuple[MethodReport, list[Step]]:
    """Trains and tells its steps."""
    steps: list[Step] = []
    asked = settings("kto", 6, **kto)
    policies = TrainSettings.model_validate({"modules": modules or LORA}).policies()
    told = train_method(
        master,
        [],
        thumbs,
        load_image,
        out,
        asked,
        policies,
        on_step=steps.append,
        check=lambda: None,
        dtype=dtype,
    )
    return told, steps


@pytest.mark.parametrize(("count", "wanted", "micro"), [(5, 12, 4), (9, 27, 3), (8, 8, 2), (3, 8, 4)])
def test_an_order_is_whole_passes_in_which_neighbours_ask_different_things(count: int, wanted: int, micro: int) -> None:
    prompts = [str(number) for number in range(count)]
    order = draw_order(prompts, wanted, micro, seed=0)
    assert len(order.rows) == wanted
    seen = Counter(order.rows)
    assert set(seen.values()) <= {wanted // count, -(-wanted // count)}
    for start in range(0, wanted, micro):
        batch = order.rows[start : start + micro]
        assert all(prompts[a] != prompts[b] for a, b in zip(batch, (*batch[1:], batch[0]), strict=True))
    assert order.alike == 0
    assert draw_order(prompts, wanted, micro, seed=0) == order
    assert draw_order(prompts, wanted, micro, seed=1).rows != order.rows


def test_many_answers_to_few_prompts_are_kept_apart_and_what_cannot_be_is_counted() -> None:
    few = draw_order(["a"] * 6 + ["b"] * 6, 12, 2, seed=0)
    assert few.alike == 0
    assert draw_order(["a"] * 4, 8, 4, seed=0).alike == 8
    assert 0 < draw_order(["a"] * 10 + ["b", "c"], 12, 4, seed=0).alike < 12


def test_the_batch_has_each_prompt_with_its_own_answer_and_with_anothers(
    thumbs: list[TextThumb], tiny_vlm: Path
) -> None:
    processor = load_processor(tiny_vlm)
    batch = ThumbCollator(thumbs, processor, load_image)([{"row": row} for row in (0, 1, 2)])
    assert batch["label"].tolist() == [thumbs[row].up for row in (0, 1, 2)] == [False, True, True]

    def texts(prefix: str) -> list[str]:
        marked = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"], strict=True)
        return [processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in marked]

    assert texts("") == [thumbs[row].answer for row in (0, 1, 2)]
    assert texts("KL_") == [thumbs[row].answer for row in (2, 0, 1)]
    assert batch["pixel_values"].shape[0] == 2  # each picture once: the rows 0 and 2 show one


def test_a_training_starts_at_one_half_and_moves_thumbs_apart(
    tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path
) -> None:
    """At first the policy is the reference: every reward and the KL are 0, and sigmoid(0) is a half."""
    report, steps = run(tiny_vlm, thumbs, tmp_path / "delta", epochs=6, beta=0.5)
    assert steps[0].loss == pytest.approx(0.5, abs=1e-6)
    assert (steps[0].kl, steps[0].margin) == (0.0, 0.0)
    assert steps[-1].loss < 0.4
    assert steps[-1].margin is not None
    assert steps[-1].margin > 0.5
    assert steps[-1].accuracy > 0.8
    assert [step.epoch for step in steps] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert report.learnt_from == {"answers": 6, "up": 4, "down": 2, "alike": 0}
    assert (report.steps, sorted(report.frozen)) == (6, ["aligner", "vision_tower"])
    assert all(
        bool(t.any()) for name, t in load_file(tmp_path / "delta" / "adapter_model.safetensors").items() if "_B" in name
    )


def test_the_weights_of_both_kinds_count(tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path) -> None:
    _, steps = run(tiny_vlm, thumbs, tmp_path / "delta", epochs=1, desirable_weight=2.0, undesirable_weight=0.5)
    assert steps[0].loss == pytest.approx(0.5 * (4 * 2.0 + 2 * 0.5) / 6, abs=1e-6)


def test_a_step_of_one_kind_alone_has_no_margin(tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path) -> None:
    ups = [replace(one, up=True) for one in thumbs]
    _, steps = run(tiny_vlm, ups, tmp_path / "delta", epochs=1)
    assert (steps[0].margin, steps[0].reward_rejected, steps[0].reward_chosen) == (None, None, 0.0)
    assert "margin" not in steps[0].to_json()


def test_where_weights_train_in_full_the_reference_is_the_model_before(
    tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path
) -> None:
    """All six rows are one step, so the second one's loss is the paper's of the weights after the first.

    Tolerance 1e-4: the same sums in float32 with and without padding.
    """
    modules = {"aligner": {"policy": "full", "learning_rate": 1e-3}, **LORA}
    _, steps = run(tiny_vlm, thumbs, tmp_path / "two", modules, epochs=2, beta=0.5)
    assert steps[0].loss == pytest.approx(0.5, abs=1e-5)
    assert steps[0].kl == pytest.approx(0.0, abs=1e-4)
    run(tiny_vlm, thumbs, tmp_path / "one", modules, epochs=1, beta=0.5)
    architecture, processor = read_architecture(tiny_vlm), load_processor(tiny_vlm)
    models = [load_policy(tiny_vlm, deltas, architecture, torch.float32) for deltas in ([tmp_path / "one"], [])]

    def ratio(row: int, answer: str) -> torch.Tensor:
        with torch.no_grad():
            policy, reference = (
                token_logps(model, processor, thumbs[row].prompt, thumbs[row].images, answer).sum() for model in models
            )
        return policy - reference

    prompts = [one.prompt + "".join(one.images) for one in thumbs]
    loss, _ = kto_paper(ratio, thumbs, draw_order(prompts, 12, 6, seed=0).rows[6:], (1.0, 1.0), beta=0.5)
    assert abs(float(loss) - 0.5) > 0.01
    assert steps[1].loss == pytest.approx(float(loss), abs=1e-4)


def test_over_a_model_of_half_the_bits_what_trains_is_float32(
    tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path
) -> None:
    """As on a GPU: bfloat16 weights, the aligner raised to float32, every forward under autocast."""
    modules = {"aligner": {"policy": "full", "learning_rate": 1e-4}, **LORA}
    _, steps = run(tiny_vlm, thumbs, tmp_path / "delta", modules, torch.bfloat16, epochs=1, micro_batch_size=3)
    assert steps[0].loss == pytest.approx(0.5, abs=5e-3)
    full = load_file(tmp_path / "delta" / "full.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}


def test_the_same_thumbs_and_seed_give_the_same_bytes(tiny_vlm: Path, thumbs: list[TextThumb], tmp_path: Path) -> None:
    first, second = (run(tiny_vlm, thumbs, tmp_path / name, micro_batch_size=2)[1] for name in ("a", "b"))
    assert first == second
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
