"""A pack's loss and gradients are those of its samples in a padded batch; plans lose nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from noria.errors import SettingsError
from tests.tiny_families import FAMILIES, build_tiny_family
from tests.unit.data.conversations import ALL, ONE, TEXT, TURNS, TWO, load_image
from train.data.collate import SupervisedCollator
from train.data.encode import Encoder
from train.data.packing import PackedCollator, plan
from train.data.packing.attention import NAME

TOLERANCE = 1e-4  # of a loss, in nats


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Encoder, Any]:
    """Each family's encoder and float32 model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder: Path = build_tiny_family(tmp_path_factory.mktemp(request.param), request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return request.param, Encoder(AutoProcessor.from_pretrained(folder), load_image), model.eval()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def test_the_loss_and_its_gradients_are_the_unpacked_ones(loaded: tuple[str, Encoder, Any]) -> None:
    _, encoder, model = loaded
    text = model.config.get_text_config()
    text._attn_implementation = "sdpa"
    padded = SupervisedCollator(encoder)(ALL)
    loss, gradients = loss_and_gradients(model, padded)
    packed = PackedCollator(encoder, model)([ALL])
    assert "attention_mask" not in packed
    assert packed["input_ids"].shape[1] == int(padded["attention_mask"].sum())
    assert text._attn_implementation == NAME
    for attention in (NAME, "sdpa", "eager"):  # ours, and transformers' own two ways to keep samples apart
        text._attn_implementation = attention
        same_loss, same_gradients = loss_and_gradients(model, packed)
        assert same_loss == pytest.approx(loss, abs=TOLERANCE)
        assert gradients.keys() == same_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, same_gradients[name], rtol=1e-3, atol=1e-4), name


def test_what_is_not_packed_is_attended_to_as_before(loaded: tuple[str, Encoder, Any]) -> None:
    _, encoder, model = loaded
    text = model.config.get_text_config()
    padded, alone = (SupervisedCollator(encoder)(samples) for samples in (ALL, [TURNS]))
    told = {}
    for attention in ("sdpa", NAME):
        text._attn_implementation = attention
        bare = {name: value for name, value in alone.items() if name != "attention_mask"}
        with torch.no_grad():
            losses = [float(model(**batch).loss) for batch in (padded, alone, bare)]
        words = model.generate(padded["input_ids"][:2, :1], max_new_tokens=5, do_sample=False)
        told[attention] = (losses, words.tolist())
    assert told["sdpa"][0] == pytest.approx(told[NAME][0], abs=1e-6)
    assert told["sdpa"][1] == told[NAME][1]


def test_positions_that_run_on_would_have_shown(loaded: tuple[str, Encoder, Any]) -> None:
    """The tolerance means something: without the borders the loss moves by far more."""
    _, encoder, model = loaded
    packed = PackedCollator(encoder, model)([ALL])
    with torch.no_grad():
        kept = float(model(**packed).loss)
        running = float(model(**{**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}).loss)
    assert abs(running - kept) > 100 * TOLERANCE


def test_order_and_number_of_packs_change_nothing(loaded: tuple[str, Encoder, Any]) -> None:
    _, encoder, model = loaded
    collate = PackedCollator(encoder, model)
    with torch.no_grad():
        whole = float(model(**collate([ALL])).loss)
        split = float(model(**collate([(TURNS, TEXT), (TWO,), (ONE,)])).loss)
    assert split == pytest.approx(whole, abs=TOLERANCE)


def test_mrope_positions_are_the_models_own_for_each_sample(loaded: tuple[str, Encoder, Any]) -> None:
    family, encoder, model = loaded
    packed = PackedCollator(encoder, model)([(ONE, TEXT)])
    one, text = (SupervisedCollator(encoder)([sample]) for sample in (ONE, TEXT))
    first, rest = one["input_ids"].shape[1], text["input_ids"].shape[1]
    if not family.startswith("qwen"):
        assert packed["position_ids"].tolist() == [[*range(first), *range(rest)]]
        return
    assert packed["position_ids"].shape == (4, 1, first + rest)
    own, _ = model.model.get_rope_index(
        one["input_ids"], mm_token_type_ids=one["mm_token_type_ids"], image_grid_thw=one["image_grid_thw"]
    )
    assert torch.equal(packed["position_ids"][1:, :, :first], own)
    assert packed["position_ids"][0, 0].tolist() == [*range(first), *range(rest)]
    assert packed["position_ids"][1:, 0, first:].tolist() == [list(range(rest))] * 3


def test_a_wrapped_model_still_numbers_positions(loaded: tuple[str, Encoder, Any]) -> None:
    family, encoder, model = loaded
    wrapped = torch.nn.ModuleDict({"module": model})
    plain, through = (PackedCollator(encoder, one)([(ONE,)])["position_ids"] for one in (model, wrapped))
    assert torch.equal(plain, through)
    assert plain.ndim == (3 if family.startswith("qwen") else 2)


def test_a_plan_has_every_sample_once_within_the_budget() -> None:
    lengths = [(n * 7919) % 251 + 5 for n in range(3000)]
    packs = plan(lengths, 512, seed=4)
    assert Counter(number for pack in packs for number in pack) == Counter(range(3000))
    filled = [sum(lengths[number] for number in pack) for pack in packs]
    assert max(filled) <= 512
    assert sum(filled) / (512 * len(packs)) > 0.97
    assert packs == plan(lengths, 512, seed=4) != plan(lengths, 512, seed=5)
    assert plan([], 512) == []
    with pytest.raises(SettingsError, match="holds 250 tokens and a sample has 255"):
        plan(lengths, 250)
