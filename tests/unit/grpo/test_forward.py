"""A shared prompt's forward gives each answer the numbers, and the gradients, that it has alone; in every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from noria.errors import TrainingError
from tests.tiny_families import FAMILIES, build_tiny_family
from tests.unit.data.conversations import ONE, TEXT, TWO, load_image
from train.data.render import ChatRenderer
from train.data.samples import Sample
from train.methods.grpo.forward import AnswerForward
from train.methods.grpo.layout import Layouts, Row

TEMPERATURE = 0.7
TOLERANCE = 2e-5  # of a log-probability, in nats: the same sums in float32, in another order
ANSWERS = ((40, 41, 42), (50,), (60, 61, 62, 63, 64))


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Each family's processor and float32 model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder: Path = build_tiny_family(tmp_path_factory.mktemp(request.param), request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return AutoProcessor.from_pretrained(folder), model.eval()


def prepared(processor: Any, sample: Sample) -> dict[str, Any]:
    """The prompt's tensors by the processor."""
    text = ChatRenderer(processor).prompt(sample.messages[:1])
    pictures = [load_image(name) for name in sample.images[:2]]
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False))


def row(inputs: dict[str, Any], answers: Sequence[tuple[int, ...]]) -> Row:
    pictures = {
        name: torch.as_tensor(value)
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    return Row(tuple(inputs["input_ids"][0].tolist()), tuple(answers), pictures)


def alone(model: Any, inputs: dict[str, Any], answer: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one answer, from full logits of one plain sequence."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in more:
        more["mm_token_type_ids"] = torch.nn.functional.pad(
            torch.as_tensor(more["mm_token_type_ids"]), (0, len(answer))
        )
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0] / TEMPERATURE
    logps = torch.log_softmax(logits[-len(answer) - 1 : -1], dim=-1)
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@contextmanager
def answering(model: Any, image_id: int) -> Iterator[AnswerForward]:
    """The model with TRL's head and ours around it, and as it was afterwards."""
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    try:
        yield AnswerForward(model, image_id)
    finally:
        del model.forward
        model.model._forward_hooks.clear()
        model.model.__dict__.pop("get_image_features", None)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [True, False])
def test_answers_have_the_numbers_that_they_have_alone(loaded: tuple[Any, Any], share: bool, attention: str) -> None:
    """Two pictures, one picture, none; three answers of different lengths to each."""
    processor, model = loaded
    model.config.get_text_config()._attn_implementation = attention
    prompts = [prepared(processor, sample) for sample in (TWO, ONE, TEXT)]
    model.zero_grad()
    for name, parameter in model.named_parameters():  # tower and aligner are frozen, as in every such training
        parameter.requires_grad_("language_model" in name or "text_model" in name)
    expected, entropies = zip(*[alone(model, one, answer) for one in prompts for answer in ANSWERS], strict=True)
    torch.cat(expected).sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    layouts = Layouts(model, pad_id=3, share_prompts=share)
    layout = layouts.lay_out([row(one, ANSWERS) for one in prompts])
    assert layout.inputs["input_ids"].shape[0] == (3 if share else 9)
    with answering(model, layouts.image_id) as forward:
        features: dict[str, Any] = {}
        logps, entropy = forward(layout, features, "here", entropy=True)
        again, nothing = forward(layout, features, "here", entropy=False)
    assert nothing is None
    assert torch.equal(again, logps)
    assert entropy is not None
    for number, answer in enumerate(ANSWERS * 3):
        torch.testing.assert_close(logps[number, : len(answer)], expected[number], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(entropy[number, : len(answer)], entropies[number], atol=TOLERANCE, rtol=1e-5)
        assert not logps[number, len(answer) :].any()
    logps.sum().backward()
    found = gradients(model)
    assert wanted
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_pictures_are_computed_once_for_all_passes(loaded: tuple[Any, Any]) -> None:
    processor, model = loaded
    layouts = Layouts(model, pad_id=3)
    layout = layouts.lay_out([row(prepared(processor, sample), ANSWERS) for sample in (TWO, ONE)])
    calls: list[int] = []
    original = model.model.get_image_features

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.model.get_image_features = counted
    with answering(model, layouts.image_id) as forward:
        features: dict[str, Any] = {}
        for _ in range(3):
            forward(layout, features, "here", entropy=False)
    assert calls == [1]


@pytest.mark.parametrize("change", [1, -1])
def test_other_numbers_of_picture_tokens_are_refused(loaded: tuple[Any, Any], change: int) -> None:
    """By what the tower gives; a placeholder without a picture, too. `ModelPictures` asks the processor before."""
    processor, model = loaded
    one = row(prepared(processor, ONE), ANSWERS)
    layouts = Layouts(model, pad_id=3, share_prompts=False)
    at, found = one.prompt.index(layouts.image_id), one.prompt.count(layouts.image_id)
    more, less = (*one.prompt[:at], layouts.image_id, *one.prompt[at:]), one.prompt[:at] + one.prompt[at + 1 :]
    wrong = layouts.lay_out([Row(more if change > 0 else less, ANSWERS, one.pictures)])
    bare = layouts.lay_out([Row(one.prompt, ANSWERS)])
    given, wanted = (len(ANSWERS) * number for number in (found + change, found))
    with answering(model, layouts.image_id) as forward:
        with pytest.raises(
            TrainingError, match=rf"row 1: .* have {given} tokens of pictures, .* give {wanted}:"
        ) as why:
            forward(wrong, {}, "row 1", entropy=False)
        assert why.value.code == "image_tokens"
        with pytest.raises(TrainingError, match=rf"have {wanted} tokens of pictures, .* give 0:"):
            forward(bare, {}, "row 1", entropy=False)


def test_a_row_longer_than_the_models_window_is_not_shared(loaded: tuple[Any, Any]) -> None:
    processor, model = loaded
    one = row(prepared(processor, TEXT), ANSWERS)
    layouts = Layouts(model, pad_id=3)
    layouts._window = one.tokens
    assert layouts.lay_out([one]).inputs["attention_mask"].ndim == 4
    layouts._window = one.tokens - 1
    assert layouts.lay_out([one]).inputs["attention_mask"].shape[0] == len(ANSWERS)


def test_answers_that_are_long_beside_their_prompt_are_not_shared(loaded: tuple[Any, Any]) -> None:
    processor, model = loaded
    one = row(prepared(processor, TEXT), ANSWERS)
    layouts = Layouts(model, pad_id=3)
    long = Row(one.prompt, tuple((50,) * 500 for _ in range(4)))
    assert layouts.lay_out([one]).inputs["input_ids"].shape[0] == 1
    assert layouts.lay_out([long]).inputs["input_ids"].shape == (4, len(one.prompt) + 500)
