"""Batches against a slow reference, on every family; what truncation may cut, and what it counts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from noria.errors import TrainingError
from tests.tiny_families import FAMILIES, build_tiny_family
from tests.unit.data.conversations import ALL, ONE, TEXT, TURNS, TWO, asked, load_image, sample, told
from train.data.collate import SupervisedCollator
from train.data.encode import Encoder
from train.data.samples import Sample

PICTURE_TOKENS = 16  # of the tiny LLaVA: (32 / 8)^2


def read_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tiny_vlm: Path) -> Any:
    """The tiny LLaVA's."""
    return read_processor(tiny_vlm)


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family's in turn."""
    return read_processor(build_tiny_family(tmp_path_factory.mktemp(request.param), request.param))


def shaped(one: Sample) -> list[Any]:
    """Messages as the processor's own template wants them."""
    turns = []
    for turn in one.messages:
        content = turn["content"]
        if not isinstance(content, str):
            content = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
        turns.append({"role": turn["role"], "content": content})
    return turns


def slow_reference(processor: Any, samples: tuple[Sample, ...]) -> tuple[dict[str, Any], list[list[int]]]:
    """The whole conversations through the processor in one call; labels token by token, by looking for the turns."""
    texts = [
        processor.apply_chat_template(shaped(one), tokenize=False).removesuffix("<|im_end|>\n") + "<|im_end|>"
        for one in samples
    ]
    pictures = [[load_image(name) for name in one.images] for one in samples]
    nested = type(processor).__name__.startswith("Idefics3")
    batch = processor(
        text=texts,
        images=pictures if nested else [one for row in pictures for one in row],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )
    tokenizer = processor.tokenizer
    begin = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = []
    for row in batch["input_ids"].tolist():
        inside, found = False, []
        for place, token in enumerate(row):
            found.append(token if inside else -100)
            if token == end:
                inside = False
            if row[max(0, place + 1 - len(begin)) : place + 1] == begin:
                inside = True
        labels.append(found)
    return dict(batch), labels


def test_a_batch_is_what_the_slow_reference_makes(any_processor: Any) -> None:
    batch = SupervisedCollator(Encoder(any_processor, load_image))(ALL)
    wanted, labels = slow_reference(any_processor, ALL)
    assert batch["labels"].tolist() == labels
    assert sorted(batch) == sorted({*wanted, "labels"})
    for name, tensor in wanted.items():
        assert torch.equal(batch[name], torch.as_tensor(tensor)), name
    taught = [any_processor.tokenizer.decode([t for t in row if t != -100]) for row in batch["labels"].tolist()]
    assert taught[:2] == ["a red square<|im_end|>", "yes<|im_end|>"]
    assert taught[3] == "a big one<|im_end|>no<|im_end|>the end<|im_end|>"


def test_text_alone_makes_a_batch_without_pictures(any_processor: Any) -> None:
    batch = SupervisedCollator(Encoder(any_processor, load_image))([TEXT])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_only_the_last_answer_where_that_is_asked(processor: Any) -> None:
    encoder = Encoder(processor, load_image, turns="last")
    assert taught(processor, encoder.encode(TURNS)) == "the end<|im_end|>"


def test_a_cut_answer_is_not_taught_to_end(processor: Any) -> None:
    encoder = Encoder(processor, load_image)
    assert taught(processor, encoder.encode(replace(ONE, cut=True))) == "a red square"
    assert taught(processor, encoder.encode(replace(TURNS, cut=True))) == "a big one<|im_end|>no<|im_end|>the end"


def taught(processor: Any, encoded: Any) -> str:
    return str(processor.tokenizer.decode(encoded.labels_T[encoded.labels_T != -100]))


def lengths(processor: Any, one: Sample) -> int:
    encoded = Encoder(processor, load_image).encode(one)
    assert encoded is not None
    return len(encoded)


def test_a_long_answer_loses_text_from_the_right(processor: Any) -> None:
    full = lengths(processor, ONE)
    encoder = Encoder(processor, load_image, max_length=full - 2)
    encoded = encoder.encode(ONE)
    assert encoded is not None
    assert len(encoded) == full - 2
    assert taught(processor, encoded) == "a red"  # " square" and the end of turn are one token each
    assert (encoder.counts.whole, encoder.counts.shortened, encoder.counts.dropped) == (0, 1, {})


def test_no_length_cuts_through_a_picture_or_a_character(processor: Any) -> None:
    """Every limit there is: the pictures that are shown are whole, and the answer is a text."""
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    talk = sample(asked("which", "red", "blue"), told("größer é"), asked("and", "green"), told("naïve ☃ yes"))
    outcomes = set()
    for limit in range(1, lengths(processor, talk) + 1):
        encoder = Encoder(processor, load_image, max_length=limit)
        encoded = encoder.encode(talk)
        if encoded is None:
            assert encoder.counts.dropped == {"too long": 1}
            outcomes.add(0)
            continue
        assert len(encoded) <= limit
        shown = int((encoded.input_ids_T == image_id).sum())
        assert shown == PICTURE_TOKENS * len(encoded.picture_tensors["pixel_values"])
        outcomes.add(shown // PICTURE_TOKENS)
        text = taught(processor, encoded)
        assert "\ufffd" not in text
        assert "größer é<|im_end|>naïve ☃ yes<|im_end|>".startswith(text)
    assert outcomes == {0, 2, 3}


def test_a_conversation_may_end_with_an_earlier_answer(processor: Any) -> None:
    first = lengths(processor, replace(TURNS, messages=TURNS.messages[:2], images=TURNS.images[:1]))
    encoder = Encoder(processor, load_image, max_length=first + 5)
    encoded = encoder.encode(TURNS)
    assert encoded is not None
    assert taught(processor, encoded) == "a big one<|im_end|>"
    assert len(encoded) == first
    assert encoded.picture_tensors["pixel_values"].shape[0] == 1


def test_words_that_spell_the_placeholder_are_left_out_and_counted(processor: Any) -> None:
    encoder = Encoder(processor, load_image)
    assert encoder.encode(sample(asked("what is <image>"), told("a tag"))) is None
    assert encoder.encode(sample(asked("what"), told("an <image> tag"))) is None
    assert encoder.counts.dropped == {"placeholders and pictures differ": 2}
    with pytest.raises(TrainingError, match=r"no sample of a batch .*rows\.jsonl:9"):
        SupervisedCollator(encoder)([sample(asked("<image>"), told("x"), source="rows.jsonl:9")])


def test_measuring_foretells_the_lengths_and_what_is_dropped(any_processor: Any) -> None:
    seen: list[int] = []
    encoder = Encoder(any_processor, load_image, max_length=120)
    measured = encoder.measure(ALL, seen.append)
    again = Encoder(any_processor, load_image, max_length=120)
    encoded = [again.encode(one) for one in ALL]
    assert measured.kept == [number for number, one in enumerate(encoded) if one is not None]
    assert measured.lengths == [len(one) for one in encoded if one is not None]
    assert seen == [1, 2, 3, 4]
    assert len(measured.kept) > 0


def test_an_unreadable_picture_is_a_bad_row(processor: Any) -> None:
    def load(reference: str) -> Any:
        if reference == "blue":
            raise TrainingError("picture blue cannot be read", code="bad_image")
        return load_image(reference)

    encoder = Encoder(processor, load)
    measured = encoder.measure([ONE, replace(TWO, source="d/rows.jsonl:12"), TEXT])
    assert measured.kept == [0, 2]
    assert [(bad.file, bad.line, bad.reason) for bad in measured.bad] == [
        ("d/rows.jsonl", 12, "picture blue cannot be read")
    ]
    assert encoder.counts.dropped == {"unreadable picture": 1}


def test_a_template_that_forgets_earlier_answers_teaches_the_last_one(processor: Any) -> None:
    forgetful = copy.deepcopy(processor)
    forgetful.chat_template = forgetful.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] != 'assistant' or loop.last %}"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
        "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = Encoder(forgetful, load_image)
    assert taught(processor, encoder.encode(TURNS)) == "the end<|im_end|>"
    assert encoder.counts.last_only == 1


def test_a_tokenizer_that_joins_prompt_and_answer_is_kept_from_it(processor: Any) -> None:
    joining = copy.deepcopy(processor)
    joining.chat_template = joining.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded = Encoder(joining, load_image).encode(sample(asked("colour?"), told("red")))
    assert encoded is not None
    prompt = joining.tokenizer("user: colour?<|im_end|>assistant: ", add_special_tokens=False)["input_ids"]
    answer = joining.tokenizer("red<|im_end|>", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids_T.tolist() == prompt + answer
    assert encoded.labels_T.tolist() == [-100] * len(prompt) + answer
