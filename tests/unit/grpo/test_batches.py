"""Batches of groups: which are trained on, which are not and why, in counts that add up; how old they may be."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from noria.errors import TrainingError
from noria.methods.grpo import PromptSource
from noria.records import Json
from noria.sampling.records import Drawing, Group, Sample
from tests.unit.grpo.material import settings
from tests.unit.grpo.scripted import ScriptedSampler
from train.data.sources import ImageLoader
from train.methods.grpo.groups import Answer, Prompt, advantages
from train.methods.grpo.groups import Group as Scored
from train.methods.grpo.sampling.batches import LEFT_OUT, Batch, Batches
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.pictures import WirePictures
from train.methods.grpo.sampling.prompts import SourcePrompts, Stream
from train.rewards import Sample as Judged
from train.rewards import combine

IMAGE_ID = 99


class Written(ScriptedSampler):
    """A sampler that says what a prompt's own text tells: `1 2 3` are its answers; `refused`, and `long 1 2`, happen.

    `<1` is an answer with a picture's token, `1-` one that was cut.
    """

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.version_of: dict[str, str] = {}

    def groups(self, asked: list[Sequence[Json]], drawing: Drawing, adapter: str | None) -> Iterator[Group]:
        """A group a prompt."""
        self.rounds.append(len(asked))
        for place, messages in enumerate(asked):
            text = str(messages[0]["content"])
            if text == "refused":
                yield Group(place, tuple(messages), "here", error="the prompt is too long")
                continue
            ids = (1,) * (5000 if text.startswith("long") else 3)
            words = text.removeprefix("long ").split()
            samples = tuple(self._sample(index, word) for index, word in enumerate(words))
            found = self.version_of.get(text, "v1")
            yield Group(place, tuple(messages), "here", found, "", adapter, ids, 1.0, samples)

    def _sample(self, index: int, word: str) -> Sample:
        cut = word.endswith("-")
        ids = (IMAGE_ID,) if word.startswith("<") else (int(word.strip("<-")) + 10,)
        return Sample(index, word, ids, (-1.0,) * len(ids), "length" if cut else "stop")


class Numbers:
    """An answer is worth the number that it says; 7 cannot be judged."""

    name = "number"

    def __call__(self, samples: Sequence[Judged]) -> list[float | None]:
        """One value a sample."""
        return [None if one.text == "7" else float(one.text.strip("<-")) for one in samples]


class Adapter:
    """Stands for the policy: its name, its version, and what it has seen."""

    name, version = "job-u0", "v1"

    def __init__(self) -> None:
        self.update = 0


def batches(texts: Sequence[str], **grpo: Any) -> tuple[Batches, Written, Adapter]:
    """Over one source of prompts, dealt in their order."""
    asked = settings(**{"group_size": 2, "max_rounds": 8, **grpo})
    found = tuple(Prompt(f"rows:{n}", ({"role": "user", "content": text},)) for n, text in enumerate(texts))
    stream = Stream((SourcePrompts(PromptSource(source="rows"), found),), 0)
    stream._order = iter(found)
    sampler, adapter = Written(), Adapter()
    patience = Patience("v1", 0.0, lambda: None)
    scorer = combine([Numbers()], max_failure_rate=1.0)
    made: Any = Batches
    return made(asked, stream, adapter, sampler, scorer, lambda m: list(m), patience, IMAGE_ID), sampler, adapter


def names(batch: Batch) -> list[str]:
    return [str(group.prompt.messages[0]["content"]) for group in batch.groups]


def adds_up(batch: Batch) -> bool:
    """asked + left = used + kept + everything that was left out."""
    counts = batch.counts
    return counts["asked"] + counts["left"] == sum(counts[key] for key in ("used", "kept", *LEFT_OUT))


def test_groups_that_teach_nothing_are_dropped_and_counted() -> None:
    made, sampler, _ = batches(["1 1", "1 2", "3 3", "0 5"], prompts_per_step=4, zero_variance="drop")
    batch = made.batch(0)
    assert names(batch) == ["1 2", "0 5"]
    assert sampler.rounds == [4]
    assert {key: count for key, count in batch.counts.items() if count} == {"asked": 4, "used": 2, "same": 2}
    assert adds_up(batch)
    assert len(batch.seen) == 4  # rewards are told of all that was sampled, not of the lucky ones
    assert batch.parts == {"number": pytest.approx(16 / 8)}


def test_or_others_are_asked_in_their_place() -> None:
    texts = ["1 1", "1 2", "3 3", "4 4", "5 6", "7 8", "9 9", "2 3"]
    made, sampler, _ = batches(texts, prompts_per_step=2, zero_variance="resample", max_staleness=0)
    batch = made.batch(0)
    assert names(batch) == ["1 2", "5 6"]
    assert sampler.rounds == [2, 1, 1, 1]
    assert (batch.counts["same"], batch.counts["asked"], batch.rounds) == (3, 5, 4)
    assert adds_up(batch)


def test_a_group_of_which_one_answer_is_judged_is_the_same_all_over() -> None:
    made, _, _ = batches(["7 8", "1 2"], prompts_per_step=2, zero_variance="drop")
    batch = made.batch(0)
    assert names(batch) == ["1 2"]
    assert (batch.counts["same"], batch.unjudged) == (1, 1)


def test_dropping_everything_asks_again_and_ends_with_words() -> None:
    made, sampler, _ = batches(["1 1", "2 2", "3 3", "1 2"], prompts_per_step=2, zero_variance="drop", max_rounds=2)
    assert names(made.batch(0)) == ["1 2"]
    assert sampler.rounds == [2, 2]
    made, _, _ = batches(["1 1"] * 9 + ["refused"] * 3, prompts_per_step=4, max_rounds=3)
    with pytest.raises(
        TrainingError, match=r"no group to learn from in 3 rounds of 4 prompts \(12 asked, 9 same, 3"
    ) as why:
        made.batch(0)
    assert why.value.code == "no_signal"


def test_why_prompts_are_refused_is_told_where_nothing_else_comes_and_once_before() -> None:
    made, _, _ = batches(["refused"] * 4, prompts_per_step=2, max_rounds=2)
    told: list[str] = []
    made._tell = told.append
    with pytest.raises(TrainingError) as why:
        made.batch(0)
    assert why.value.message.endswith(
        "(4 asked, 4 refused); the first that was refused is rows:0: the prompt is too long"
    )
    assert told == [
        "a prompt is left out, and others may be; they are counted as refused: rows:0: the prompt is too long"
    ]
    made, _, _ = batches(["long 1 2"] * 2, prompts_per_step=1, max_rounds=2)
    with pytest.raises(TrainingError, match=r"\(2 asked, 2 too_long\); .* are above train\.grpo\.max_length=4096$"):
        made.batch(0)


def test_a_text_with_the_models_own_sign_of_a_picture_costs_its_prompt() -> None:
    """The engine would read a picture's token without a picture; the trainer would find its tower's answer missing."""
    made, sampler, _ = batches(["1 2", "3 4 <image>"], prompts_per_step=2, zero_variance="drop")
    made._wire = WirePictures(ImageLoader().read, "<image>")
    batch = made.batch(0)
    assert (names(batch), batch.counts["refused"], sampler.rounds) == (["1 2"], 1, [1])
    assert adds_up(batch)
    for part in ("an <image>", {"type": "text", "text": "<image>"}, {"type": "input_text", "text": "<image>"}):
        with pytest.raises(TrainingError, match="a text holds '<image>', which the model reads as a picture"):
            made._wire([{"role": "user", "content": [part]}])


def test_what_cannot_be_used_is_counted_by_its_reason() -> None:
    texts = ["long 1 2", "refused", "1 2", "3 4", "<1 <2", "1 2-"]
    made, sampler, _ = batches(texts, prompts_per_step=6, zero_variance="drop", mask_truncated=True)
    sampler.version_of["3 4"] = "v2"
    batch = made.batch(0)
    assert names(batch) == ["1 2", "1 2-"]
    told = {key: count for key, count in batch.counts.items() if count}
    assert told == {"asked": 6, "used": 2, "too_long": 1, "refused": 1, "superseded": 1, "unusable": 1}
    assert adds_up(batch)
    assert [one.trains for one in batch.groups[1].answers] == [True, False]  # the cut one counts in the mean only


def test_groups_that_are_left_over_are_used_next_unless_they_are_too_old() -> None:
    """Half of the groups teach nothing, so twice as many as are missing are asked, and some are left."""
    texts = ["1 1", "1 2", "2 2", "3 4", "5 6", "7 7", "8 9", "1 0", "2 0", "3 0", "4 0", "5 0"]
    made, sampler, adapter = batches(texts, prompts_per_step=3, zero_variance="resample", max_staleness=1)
    first = made.batch(0)
    assert (names(first), sampler.rounds) == (["1 2", "3 4", "5 6"], [3, 3])
    assert first.counts["kept"] == 0
    made._left = [scored("9 1", update=0), scored("9 2", update=0)]
    adapter.update = 1
    second = made.batch(1)
    assert names(second)[:2] == ["9 1", "9 2"]
    assert [1 - group.update for group in second.groups] == [1, 1, 0]
    assert (second.counts["left"], second.counts["stale"]) == (2, 0)
    assert adds_up(second)
    made._left = [scored("9 3", update=0), scored("9 4", update=1)]
    adapter.update = 2
    third = made.batch(2)
    assert "9 3" not in names(third)
    assert names(third)[0] == "9 4"
    assert (third.counts["left"], third.counts["stale"]) == (2, 1)
    assert adds_up(third)


def test_more_than_is_missing_is_asked_and_the_rest_kept() -> None:
    texts = ["1 1", "2 2", "3 3", "1 2", "3 4", "5 6", "7 9", "1 0"]
    made, sampler, _ = batches(texts, prompts_per_step=3, zero_variance="resample", max_staleness=1)
    made._rate = 0.5
    made._left = [scored("9 1", update=0)]
    batch = made.batch(1)
    assert sampler.rounds == [3, 3]
    assert names(batch) == ["9 1", "1 2", "3 4"]
    assert (batch.counts["kept"], [str(one.prompt.messages[0]["content"]) for one in made._left]) == (1, ["5 6"])
    assert adds_up(batch)


def test_with_several_passes_a_group_must_be_young_enough_for_the_last() -> None:
    made, _, adapter = batches(["1 2", "3 4"], prompts_per_step=1, iterations=2, max_staleness=2)
    made._left = [scored("9 1", update=0)]
    adapter.update = 2
    batch = made.batch(2)  # 2 updates old at the first pass, 3 at the second
    assert (names(batch), batch.counts["stale"]) == (["1 2"], 1)


def test_a_picture_that_cannot_be_read_costs_its_prompt(tmp_path: Path) -> None:
    made, _, _ = batches(["1 2", "3 4"], prompts_per_step=2, zero_variance="drop")
    read = WirePictures(ImageLoader(named=True).read, "<image>")

    def wire(messages: Sequence[Json]) -> list[Json]:
        if messages[0]["content"] == "1 2":
            read([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(tmp_path / "no.png")}}]}])
        return list(messages)

    made._wire = wire
    batch = made.batch(0)
    assert (names(batch), batch.counts["refused"]) == (["3 4"], 1)
    assert adds_up(batch)


def test_another_temperature_of_the_engines_is_refused() -> None:
    made, _, _ = batches(["1 2"], prompts_per_step=1, temperature=0.7)
    with pytest.raises(TrainingError, match=r"log-probabilities at temperature 1, the policy is trained at .*=0\.7"):
        made.batch(0)


def test_pictures_travel_as_the_bytes_that_they_are(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (4, 3), "red").save(path)
    blob = path.read_bytes()
    wire = WirePictures(ImageLoader({"ab" * 32: blob}.__getitem__, named=True).read, "<image>")
    urls = [str(path), "noria-blob:" + "ab" * 32, "data:image/png;base64,xyz", "scene:train/one/0/0"]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    sent = wire([{"role": "system", "content": "hi"}, {"role": "user", "content": parts}])
    assert sent[0] == {"role": "system", "content": "hi"}
    found = [part["image_url"]["url"] for part in sent[1]["content"]]
    assert found[0] == found[1] == f"data:image/png;base64,{base64.b64encode(blob).decode()}"
    assert found[2] == "data:image/png;base64,xyz"
    assert found[3].startswith("data:image/png;base64,iVBOR")
    odd = [{"type": "input_image", "image_url": urls[1]}, {"type": "input_text", "text": "what"}, "is it"]
    (told,) = wire([{"role": "user", "content": odd}])
    assert told["content"][0] == {"type": "image_url", "image_url": {"url": found[1]}}
    assert told["content"][1:] == [{"type": "text", "text": "what"}, {"type": "text", "text": "is it"}]


def test_advantages_are_differences_from_the_groups_mean() -> None:
    groups = [scored("1 2 6"), scored("4 4 4"), scored("0 1", rewards=(0.0, None))]
    by_group = advantages(groups, "group")
    assert by_group[0] == pytest.approx([-2 / (7**0.5 + 1e-4), -1 / (7**0.5 + 1e-4), 3 / (7**0.5 + 1e-4)])
    assert by_group[1:] == [[0.0, 0.0, 0.0], [0.0, 0.0]]
    assert advantages(groups, "none")[0] == [-2.0, -1.0, 3.0]
    whole = (26 / 6) ** 0.5  # of 1 2 6 4 4 4 0, whose mean is 3
    assert advantages(groups, "batch")[0] == pytest.approx(
        [-2 / (whole + 1e-4), -1 / (whole + 1e-4), 3 / (whole + 1e-4)]
    )


def scored(text: str, update: int = 0, rewards: Sequence[float | None] | None = None) -> Scored:
    """A group as it is kept."""
    worth = [float(word) for word in text.split()] if rewards is None else rewards
    answers = tuple(Answer(word, (1,), (-1.0,), "stop", one) for word, one in zip(text.split(), worth, strict=True))
    return Scored(Prompt("rows:x", ({"role": "user", "content": text},)), (1, 2), answers, update, "v1")
