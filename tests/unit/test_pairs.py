"""Preferences as the texts that a method trains on: rendered as the engine would, cut answers left open, counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.preferences.material import load_image, pair
from train.data.pairs import PairRenderer
from train.data.render import ChatRenderer
from train.methods.policy_model import load_processor


@pytest.fixture(scope="module")
def renderer(tiny_vlm: Path) -> PairRenderer:
    return PairRenderer(ChatRenderer(load_processor(tiny_vlm)), load_image)


def test_prompts_are_rendered_as_the_engine_would(renderer: PairRenderer) -> None:
    pairs = [renderer.render(pair(number)) for number in range(2)]
    assert pairs[0].prompt == "<|im_start|>user\n<image>\nwhat is it<|im_end|>\n<|im_start|>assistant\n"
    assert pairs[1].prompt == "<|im_start|>user\nsay green 1<|im_end|>\n<|im_start|>assistant\n"
    assert (pairs[0].chosen, pairs[0].rejected) == ("a red square<|im_end|>", "no<|im_end|>")


def test_an_answer_that_its_limit_cut_is_not_taught_to_end_there(renderer: PairRenderer) -> None:
    cut = renderer.render(replace(pair(1), rejected_cut=True))
    assert (cut.chosen, cut.rejected) == ("a green square<|im_end|>", "no a")
    cut = renderer.render(replace(pair(1), chosen_cut=True))
    assert (cut.chosen, cut.rejected) == ("a green square", "no a<|im_end|>")


def test_a_template_of_strings_gets_pictures_in_front_of_the_text(tiny_vlm: Path) -> None:
    processor = load_processor(tiny_vlm)
    processor.chat_template = "{% for m in messages %}[{{ m['content'] + '' }}]{% endfor %}"
    strings = ChatRenderer(processor)
    assert not strings.wants_parts
    assert strings.prompt(pair(0).messages) == "[<image>\nwhat is it]"


def test_length_counts_picture_tokens_and_the_longer_answer(renderer: PairRenderer, tiny_vlm: Path) -> None:
    tokenizer = load_processor(tiny_vlm).tokenizer
    rendered = renderer.render(pair(4))
    texts = [len(tokenizer(text)["input_ids"]) for text in (rendered.prompt, rendered.chosen, rendered.rejected)]
    assert renderer.tokens(pair(4)) == texts[0] - 1 + 16 + max(texts[1:])  # (32 / 8)^2 = 16 for one placeholder
