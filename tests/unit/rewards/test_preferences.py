"""The preference head on tiny random VLMs: features, weights and accuracy against slow references, and refusals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from noria.errors import IntegrityError, LeaseLost, NotFound, TrainingError
from noria.evals.scores import wilson
from noria.module_settings import ModulePolicies
from noria.records import BLOB_SCHEME, image_references
from noria.rewards import PreferencesOptions
from tests.tiny import build_tiny_vlm
from tests.tiny_families import FAMILIES, build_tiny_family
from tests.unit.data import conversations
from tests.unit.rewards.judged import pairs, question
from train.data.samples import image_part
from train.methods.policies import apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.rewards import Backing, Failure, Sample, build, combine
from train.rewards.preferences import fit as fitting
from train.rewards.preferences.features import Answered, FeatureReader
from train.rewards.preferences.head import Head, load_head, save_head
from train.rewards.preferences.learn import learn_head, split
from train.rewards.preferences.reward import PreferenceReward

OPTIONS = PreferencesOptions(min_accuracy=0.9, held_out=0.4)
GOOD, BAD = "a red square", "a blue square"


def load_image(reference: str) -> Image.Image:
    """A stored picture is as one by its colour."""
    return conversations.load_image(reference.removeprefix(BLOB_SCHEME))


def model_of(folder: Path) -> Any:
    return load_policy(folder, [], read_architecture(folder), torch.float32)


@pytest.fixture(scope="module")
def model(tiny_vlm: Path) -> Any:
    return model_of(tiny_vlm)


@pytest.fixture(scope="module")
def processor(tiny_vlm: Path) -> Any:
    return load_processor(tiny_vlm)


def reader_of(model: Any, processor: Any, **more: Any) -> FeatureReader:
    return FeatureReader(model, processor, load_image, **{"max_length": 512, "batch_size": 3, **more})


@pytest.fixture(scope="module")
def reader(model: Any, processor: Any) -> FeatureReader:
    return reader_of(model, processor)


@pytest.fixture(scope="module")
def head(reader: FeatureReader) -> Head:
    return learn_head(pairs(60), (), reader, OPTIONS)


def backing(model: Any, processor: Any, **more: Any) -> Backing:
    told = {"processor": lambda: processor, "model": lambda: model, "load_image": load_image, **more}
    return Backing(**told)


def sample(text: str, number: int = 0, **more: Any) -> Sample:
    return Sample(question(number), text, **more)


CONVERSATIONS = [
    Answered(
        [{"role": "user", "content": [image_part("red"), {"type": "text", "text": "what is it"}]}], "a red square"
    ),
    Answered([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], "yes"),
    Answered(
        [{"role": "user", "content": [image_part("blue"), image_part("green")]}], "a blue one and a big green one"
    ),
    Answered(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "no",
    ),
]


def whole(processor: Any, one: Answered) -> Any:
    """The conversation through the family's own processor in one call, nothing padded."""
    turns = []
    for turn in (*one.messages, {"role": "assistant", "content": one.text}):
        parts = turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]
        kinds = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        turns.append({"role": turn["role"], "content": kinds})
    text = processor.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    shown: Any = [load_image(reference) for reference in image_references(one.messages)]
    nested = type(processor).__name__.startswith("Idefics3")
    images = None if not shown else [shown] if nested else shown
    return processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_one_conversation_alone(family: str, tmp_path: Path) -> None:
    folder = build_tiny_family(tmp_path / family, family)
    model, processor = model_of(folder), load_processor(folder)
    found = reader_of(model, processor, batch_size=4).read(CONVERSATIONS)
    for one, state_D in zip(CONVERSATIONS, found, strict=True):
        inputs = whole(processor, one)
        with torch.no_grad():
            wanted_D = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        assert processor.tokenizer.decode(inputs["input_ids"][0, -1]) == "<|im_end|>"
        assert not isinstance(state_D, Failure)
        assert torch.allclose(state_D, wanted_D.double(), atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 0.1  # type: ignore[operator]


def test_other_states_are_means_over_the_answer(model: Any, processor: Any) -> None:
    asked: Any = [{"role": "user", "content": "hi"}]
    three = [Answered(asked, "a red square"), Answered(asked, "no", cut=True), CONVERSATIONS[0]]
    last, mean, both = (reader_of(model, processor, state=state).read(three) for state in ("last", "mean", "both"))
    for one, last_D, mean_D, both_D in zip(three, last, mean, both, strict=True):
        inputs = whole(processor, one)
        tokens = len(processor.tokenizer(one.text)["input_ids"])
        with torch.no_grad():
            hidden_TD = model(**inputs, output_hidden_states=True).hidden_states[-1][0].double()
        wanted_D = hidden_TD[-1 - tokens : -1 if one.cut else None].mean(0)
        assert torch.allclose(mean_D, wanted_D, atol=1e-5)
        assert torch.equal(both_D, torch.cat([last_D, mean_D]))


def test_a_cut_answer_is_read_at_its_last_token(reader: FeatureReader, model: Any, processor: Any) -> None:
    asked = [{"role": "user", "content": "hi"}]
    (cut_D,) = reader.read([Answered(asked, "a red square", cut=True)])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na red square"
    with torch.no_grad():
        wanted_D = model.model(**processor.tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
    assert torch.allclose(cut_D, wanted_D.double(), atol=1e-5)


def test_what_cannot_be_read_costs_that_one(model: Any, processor: Any) -> None:
    def load(reference: str) -> Any:
        if reference == f"{BLOB_SCHEME}gone":
            raise TrainingError("it is gone", code="bad_image")
        return load_image(reference)

    reader = FeatureReader(model, processor, load, max_length=64, batch_size=4)
    audio = [{"role": "user", "content": [{"type": "input_audio"}]}]
    gone = [{"role": "user", "content": [image_part(f"{BLOB_SCHEME}gone")]}]
    asked = [{"role": "user", "content": "hi"}]
    found = reader.read(
        [Answered(gone, "x"), Answered(asked, "z" * 90), Answered(audio, "x"), Answered(asked, "", cut=True)]
    )
    assert found == [Failure("bad_image"), Failure("too long"), Failure("bad_message"), Failure("cannot be encoded")]
    named = [{"role": "user", "content": [image_part("red")]}]
    assert isinstance(reader.read([Answered(named, "x")])[0], torch.Tensor)
    assert reader.read([Answered(named, "x", captured=True)]) == [Failure("unreadable")]  # a user named it
    mixed = reader.read([Answered(asked, "z" * 90), Answered(asked, "yes")])
    assert mixed[0] == Failure("too long")
    assert torch.allclose(mixed[1], reader.read([Answered(asked, "yes")])[0], atol=1e-6)


def test_the_adapter_that_trains_is_not_in_the_features(tiny_vlm: Path, processor: Any) -> None:
    model = model_of(tiny_vlm)
    before = reader_of(model, processor).read(CONVERSATIONS)
    applied = apply_policies(model, read_architecture(tiny_vlm), ModulePolicies().resolved())
    model.train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.fill_(0.5)
    modes = [module.training for module in model.modules()]
    asked: list[int] = []
    frozen = reader_of(model, processor, frozen=applied.reference, check=lambda: asked.append(1))
    within, without = frozen.read(CONVERSATIONS), reader_of(model, processor).read(CONVERSATIONS)
    for old, new, moved in zip(before, within, without, strict=True):
        assert torch.equal(old, new)
        assert not torch.allclose(old, moved, atol=1e-3)
        assert not new.requires_grad  # type: ignore[union-attr]
    assert [module.training for module in model.modules()] == modes
    assert len(asked) == 2  # four conversations, three at a time


def test_a_job_that_must_stop_stops_between_forwards(model: Any, processor: Any) -> None:
    def check() -> None:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        reader_of(model, processor, check=check).read(CONVERSATIONS)


def drawn(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Differences with a true direction and noise, so that no weights part them wholly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + torch.linspace(0.5, -0.2, dim)


def plain_fit(rows: list[list[float]], l2: float) -> list[float]:
    """The objective's minimum by plain gradient descent, a number at a time."""
    weight = [0.0] * len(rows[0])
    for _ in range(3000):
        gradient = [l2 * one for one in weight]
        for row in rows:
            share = 1 / (1 + math.exp(sum(w * d for w, d in zip(weight, row, strict=True))))
            for at, d in enumerate(row):
                gradient[at] -= share * d / len(rows)
        weight = [w - 0.5 * g for w, g in zip(weight, gradient, strict=True)]
    return weight


@pytest.mark.parametrize("l2", [1.0, 0.1, 0.01])
def test_the_weights_are_those_of_a_slow_fit(l2: float) -> None:
    differences_ND = drawn(25, 4)
    assert fitting.fit(differences_ND, l2).tolist() == pytest.approx(plain_fit(differences_ND.tolist(), l2), abs=1e-6)


def test_more_features_than_pairs_still_have_one_answer() -> None:
    differences_ND = drawn(10, 40)
    first, other = fitting.fit(differences_ND, 0.001), fitting.fit(differences_ND, 0.001, torch.ones(40).double())
    assert torch.allclose(first, other, atol=1e-4)


def test_weights_that_do_not_settle_are_refused() -> None:
    with pytest.raises(TrainingError, match="did not settle"):
        fitting.fit(torch.full((3, 2), math.nan, dtype=torch.float64), 0.1)


def test_the_penalty_is_chosen_on_prompts_left_out() -> None:
    """Noise that repeats within a prompt: pairs of one prompt on both sides would make learning by heart look good."""
    generator = torch.Generator().manual_seed(0)
    prompt_ND = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    noise_ND = prompt_ND.repeat_interleave(5, 0)
    names = [f"prompt {number // 5}" for number in range(200)]
    chosen, losses = fitting.choose_penalty(noise_ND / math.sqrt(60), names)
    assert chosen == max(fitting.PENALTIES)
    assert losses["0.0001"] > losses["1"]
    assert losses["1"] == pytest.approx(math.log(2), abs=0.1)
    told_ND = drawn(200, 60) + 1.0
    assert fitting.choose_penalty(told_ND / math.sqrt(60), names)[0] < max(fitting.PENALTIES)
    assert fitting.choose_penalty(told_ND, ["one prompt"] * 200) == (fitting.PENALTIES[4], {})


def test_a_head_orders_pairs_that_it_has_not_seen(head: Head, reader: FeatureReader) -> None:
    learnt, unseen = split(pairs(60), OPTIONS.held_out)
    states = reader.read([side for pair in unseen for side in Answered.sides(pair)])
    scores = [plain_score(head, state) for state in states]
    right = sum(better > worse for better, worse in zip(scores[::2], scores[1::2], strict=True)) / len(unseen)
    held_out = head.figures["held_out"]
    assert (held_out["n"], held_out["score"]) == (len(unseen), right)
    assert right >= 0.9
    assert (held_out["low"], held_out["high"]) == wilson(right, len(unseen))
    assert head.figures["train"]["n"] == len(learnt) == head.figures["train"]["prompts"]
    assert head.figures["l2"] in fitting.PENALTIES
    assert head.figures["state"] == "last"
    assert not {pair.prompt_hash for pair in learnt} & {pair.prompt_hash for pair in unseen}


def plain_score(head: Head, state_D: Any) -> float:
    columns = zip(state_D.tolist(), head.mean_D.tolist(), head.scale_D.tolist(), head.weight_D.tolist(), strict=True)
    return float(sum((f - m) / s * w for f, m, s, w in columns) - head.middle) / head.spread


def test_the_reward_is_the_odds_against_an_average_answer(head: Head, reader: FeatureReader) -> None:
    texts = [GOOD, BAD, "a red circle", "a green circle"]
    raw = PreferenceReward(head, reader, PreferencesOptions(value="raw"))([sample(text) for text in texts])
    shares = PreferenceReward(head, reader, PreferencesOptions())([sample(text) for text in texts])
    for text, score, share in zip(texts, raw, shares, strict=True):
        (state,) = reader.read([Answered(question(0), text)])
        assert score == pytest.approx(plain_score(head, state), rel=1e-5, abs=1e-5)
        assert share == pytest.approx(1 / (1 + math.exp(-score)))  # type: ignore[operator]
    assert min(raw[0], raw[2]) > max(raw[1], raw[3])  # type: ignore[operator, type-var]
    both = [side for pair in split(pairs(60), 0.4)[0] for side in Answered.sides(pair)]
    found = [plain_score(head, state) for state in reader.read(both)]
    assert statistics.mean(found) == pytest.approx(0.0, abs=1e-6)
    assert statistics.pstdev(found) == pytest.approx(1.0)


def test_a_sample_that_its_limit_ended_is_read_so(head: Head, reader: FeatureReader) -> None:
    reward = PreferenceReward(head, reader, PreferencesOptions())
    whole, cut = reward([sample(GOOD), sample(GOOD, finish_reason="length")])
    assert whole != cut


def test_a_head_that_is_not_right_often_enough_is_refused(reader: FeatureReader) -> None:
    told = r"orders \d+\.\d% of \d+ held-out pairs rightly \(95 % interval"
    with pytest.raises(TrainingError, match=told) as refused:
        learn_head(pairs(60, noise=1.0), (), reader, OPTIONS)
    assert (refused.value.code, refused.value.param) == ("reward_inaccurate", "min_accuracy")


@pytest.mark.parametrize(("count", "least"), [(4, 3), (60, 61), (0, 1)])
def test_too_few_pairs_are_refused(reader: FeatureReader, count: int, least: int) -> None:
    with pytest.raises(TrainingError, match="too few preferences") as refused:
        learn_head(pairs(count), (), reader, PreferencesOptions(min_held_out=least))
    assert (refused.value.code, refused.value.param) == ("no_pairs", "min_held_out")


def test_pairs_that_cannot_be_read_are_left_out_and_counted(model: Any, processor: Any) -> None:
    many = pairs(60)
    with_pictures = sum(bool(pair.images) for pair in many)  # at least 56 tokens; the others have 43 at most
    reader = reader_of(model, processor, max_length=50)
    figures = learn_head(many, (), reader, PreferencesOptions(min_held_out=2, held_out=0.4)).figures
    left_out = [figures[part]["left_out"].get("too long", 0) for part in ("train", "held_out")]
    assert sum(left_out) == with_pictures > 0
    assert figures["train"]["n"] + figures["held_out"]["n"] + with_pictures == 60
    with pytest.raises(TrainingError, match=rf"{with_pictures} too long"):
        learn_head(many, (), reader, PreferencesOptions(min_held_out=20, held_out=0.4))


def test_the_job_s_own_held_out_pairs_are_used_where_there_are_some(reader: FeatureReader) -> None:
    found = learn_head(pairs(30), pairs(25, seed=7), reader, PreferencesOptions(l2=0.01))
    assert (found.figures["train"]["n"], found.figures["held_out"]["n"]) == (30, 25)
    assert (found.figures["l2"], found.figures["l2_losses"]) == (0.01, {})


def test_learning_again_gives_the_same_head(head: Head, reader: FeatureReader) -> None:
    again = learn_head(pairs(60), (), reader, OPTIONS)
    assert torch.equal(again.weight_D, head.weight_D)
    assert again.figures == head.figures


def test_a_head_is_kept_whole_or_not_at_all(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "reward-preferences"
    saved = save_head(head, folder)
    assert saved.figures["sha256"].startswith("sha256:")
    kept = load_head(folder)
    for name in ("weight_D", "mean_D", "scale_D", "probe_D"):
        assert torch.equal(getattr(kept, name), getattr(head, name))
    assert (kept.middle, kept.spread, kept.figures) == (head.middle, head.spread, saved.figures)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["head.json", "head.safetensors", folder.name]
    assert save_head(head, folder).figures == saved.figures
    tensors = folder / "head.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError):
        load_head(folder)
    with pytest.raises(NotFound):
        load_head(tmp_path / "none")


def test_a_job_learns_once_and_finds_its_head_again(model: Any, processor: Any, tmp_path: Path) -> None:
    learnt: list[int] = []

    def given() -> Any:
        learnt.append(1)
        return pairs(60), ()

    lent = backing(model, processor, pairs=given, folder=tmp_path)
    first, second = build(OPTIONS, lent), build(OPTIONS, lent)
    assert learnt == [1]
    assert isinstance(first, PreferenceReward) and isinstance(second, PreferenceReward)
    assert first.figures == second.figures == load_head(tmp_path / "reward-preferences").figures
    assert first([sample(GOOD)]) == second([sample(GOOD)])
    stated = OPTIONS.model_copy(update={"head": tmp_path / "reward-preferences"})
    with combine([build(stated, backing(model, processor))]) as scorer:
        scores = scorer([sample(GOOD), sample(BAD), sample("z" * 2000)])
        assert scorer.counts["preferences"]["figures"] == first.figures
    assert 1 > scores.totals[0] > scores.totals[1] > 0  # type: ignore[operator]
    assert scores.failed[2] == {"preferences": "too long"}
    with pytest.raises(TrainingError, match="min_accuracy=1"):
        build(stated.model_copy(update={"min_accuracy": 1.1}), backing(model, processor))


def test_another_model_s_head_is_refused(
    head: Head, processor: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_head(head, tmp_path / "head")
    stated = PreferencesOptions(head=tmp_path / "head")
    folder = tmp_path_factory.mktemp("other")
    for other in (build_tiny_vlm(folder / "drawn", seed=1), build_tiny_vlm(folder / "wide", hidden=128)):
        with pytest.raises(TrainingError, match="learnt on another model"):
            build(stated, backing(model_of(other), processor))


def test_a_head_says_itself_what_it_reads(model: Any, processor: Any, tmp_path: Path) -> None:
    lent = backing(model, processor, pairs=lambda: (pairs(60), ()), folder=tmp_path)
    learnt = build(OPTIONS.model_copy(update={"state": "both"}), lent)
    stated = build(PreferencesOptions(head=tmp_path / "reward-preferences"), backing(model, processor))
    assert stated([sample(GOOD)]) == learnt([sample(GOOD)])
    assert isinstance(stated, PreferenceReward)
    assert (stated.figures["state"], stated.figures["dim"]) == ("both", 128)


@pytest.mark.parametrize("missing", ["model", "processor", "pairs"])
def test_what_the_job_does_not_lend_is_named(model: Any, processor: Any, missing: str) -> None:
    lent = {"model": lambda: model, "processor": lambda: processor, "pairs": lambda: (pairs(9), ())}
    with pytest.raises(TrainingError, match="preferences has no"):
        build(OPTIONS, Backing(**{name: one for name, one in lent.items() if name != missing}))  # type: ignore[arg-type]


def test_without_a_way_to_pictures_only_pictures_fail(head: Head, model: Any, processor: Any, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head")
    reward = build(PreferencesOptions(head=tmp_path / "head"), backing(model, processor, load_image=None))
    shown, plain = reward([sample(GOOD, 0), sample(GOOD, 1)])
    assert shown == Failure("bad_image")
    assert isinstance(plain, float)
