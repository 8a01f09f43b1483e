"""Prompts from conversations, rows and made sets, in an order that a restart finds again; settings that contradict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from noria.errors import InvalidRequest, SettingsError, TrainingError
from noria.methods.grpo import GrpoSettings, PromptSource
from noria.recipes import load_recipe, parse_recipe
from noria.records import Choice, Completion, Json
from noria.scenes.asked import DRAWN_KINDS
from noria.settings import TrainSettings
from train.methods.grpo.sampling.prompts import SourcePrompts, Stream, read_prompts


def read(source: Json, captured: Iterable[Completion] = ()) -> SourcePrompts:
    (found,) = read_prompts([PromptSource.model_validate(source)], lambda _: captured)
    return found


def rows(path: Path, *found: Any) -> str:
    """A file of them, pictures beside it."""
    Image.new("RGB", (8, 8), "red").save(path.parent / "red.png")
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_rows_of_every_shape_are_prompts(tmp_path: Path) -> None:
    red = str(tmp_path / "red.png")
    picture = {"type": "image_url", "image_url": {"url": red}}
    asked = {"type": "text", "text": "what is it"}
    source = rows(
        tmp_path / "rows.jsonl",
        {"prompt": "say hi", "answers": ["hi", "hello"]},
        {"question": "what is it", "image": "red.png", "answer": "red", "kind": "colour"},
        {
            "messages": [{"role": "user", "content": "<image>what is it"}, {"role": "assistant", "content": "red"}],
            "images": ["red.png"],
        },
        {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], "answers": "yes"},
        {"question": "which", "options": ["red", "blue"], "answer": "A"},
        {"text": "nothing is asked"},
        {"prompt": "x", "image": "gone.png"},
        "not a row",
    )
    found = read({"source": source})
    assert [one.answers for one in found.prompts] == [("hi", "hello"), ("red",), ("red",), ("yes",), ("A",)]
    assert found.prompts[0].messages == ({"role": "user", "content": "say hi"},)
    for one in found.prompts[1:3]:
        assert one.messages == ({"role": "user", "content": [picture, asked]},)
        assert one.images == (red,)
    assert found.prompts[1].extra == {"kind": "colour"}
    assert [turn["role"] for turn in found.prompts[3].messages] == ["system", "user"]
    assert str(found.prompts[4].messages[0]["content"]).splitlines()[:3] == ["which", "(A) red", "(B) blue"]
    assert found.prompts[4].extra == {"options": ["red", "blue"]}
    assert [(bad.line, bad.reason.split(";")[0]) for bad in found.bad] == [
        (6, "the row has no messages, prompt or question"),
        (7, f"picture 'gone.png' is not there (looked for {tmp_path / 'gone.png'})"),
        (8, "the row is str, not an object"),
    ]
    assert found.report()["bad_rows"] == 3
    assert found.prompts[0].source == f"{source}:1"


def test_the_hash_follows_what_is_asked_and_known(tmp_path: Path) -> None:
    one = read({"source": rows(tmp_path / "a.jsonl", {"prompt": "hi", "answer": "a"})}).sha256
    assert read({"source": rows(tmp_path / "a.jsonl", {"prompt": "hi", "answer": "a"})}).sha256 == one
    for other in (
        {"prompt": "ho", "answer": "a"},
        {"prompt": "hi", "answer": "b"},
        {"prompt": "hi", "answer": "a", "x": 1},
    ):
        assert read({"source": rows(tmp_path / "a.jsonl", other)}).sha256 != one


def test_a_count_takes_a_seeded_choice(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", *({"prompt": f"say {n}"} for n in range(20)))
    chosen = [[one.source for one in read({"source": source, "count": 5, "seed": seed}).prompts] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5


def test_a_source_without_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"prompts of '.*a\.jsonl': there is none: .*a\.jsonl:1: the row has no"
    ) as why:
        read({"source": rows(tmp_path / "a.jsonl", {"text": "x"})})
    assert why.value.code == "no_data"
    with pytest.raises(TrainingError, match="prompts of 'captured': there is none"):
        read({})


def test_made_scenes_are_asked_with_their_truth() -> None:
    found = read({"source": "scenes", "count": 7, "kinds": ["count", "colour"]})
    assert [one.extra["kind"] for one in found.prompts] == ["colour", "count"] * 3 + ["colour"]
    for one in found.prompts:
        assert one.images[0].startswith("scene:train/")
        assert len(one.answers) == 1
    assert [one.answers for one in found.prompts[1::2]] == [("1",), ("2",), ("3",)]
    everything = read({"source": "scenes", "count": 2 * len(DRAWN_KINDS)})
    assert Counter(one.extra["kind"] for one in everything.prompts) == dict.fromkeys(DRAWN_KINDS, 2)
    assert read({"source": "scenes", "count": 7, "seed": 9}).sha256 != found.sha256
    with pytest.raises(InvalidRequest, match="no kind of questions is called 'smell'; there are colour, "):
        read({"source": "scenes", "kinds": ["smell"]})


def test_other_made_sets_give_their_question_and_answer() -> None:
    found = read({"source": "digits", "count": 40}).prompts
    assert found[0].images[0].startswith("digit:")
    assert len(found[0].messages) == 1
    assert all(one.answers[0].isdigit() for one in found), "of the right sentences there are many"


def test_captured_conversations_are_asked_again() -> None:
    shown: Json = {"type": "image_url", "image_url": {"url": "noria-blob:" + "ab" * 32}}
    messages = ({"role": "user", "content": [shown, {"type": "text", "text": "hm"}]},)
    said = (Choice(0, "an answer", {"role": "assistant", "content": "an answer"}),)
    kept = Completion("chatcmpl-1", 1.0, "noria", "v1", messages, {}, "hash", said)
    (one,) = read({}, [kept]).prompts
    assert (one.source, one.messages, one.answers) == ("captured:chatcmpl-1", messages, ())
    assert one.images == (shown["image_url"]["url"],)


def test_what_a_user_named_and_nobody_stored_is_not_asked_and_counted() -> None:
    """The engine fetched it then; here it would be fetched with this machine's rights, as a file or an address."""
    named = {"type": "image_url", "image_url": {"url": "/etc/hostname"}}
    asked = [({"role": "user", "content": content},) for content in ("hm", [named], [{"type": "input_audio"}])]
    kept = [Completion(f"chatcmpl-{n}", 1.0, "noria", "v1", one, {}, "hash", ()) for n, one in enumerate(asked)]
    found = read({}, kept)
    assert [one.source for one in found.prompts] == ["captured:chatcmpl-0"]
    assert [bad.reason for bad in found.bad] == [f"chatcmpl-{n} shows what was not stored" for n in (1, 2)]


def test_a_stream_mixes_by_weight_and_goes_on_where_it_was(tmp_path: Path) -> None:
    sources = [
        PromptSource(source=rows(tmp_path / "a.jsonl", *({"prompt": f"a{n}"} for n in range(10))), weight=3.0),
        PromptSource(source=rows(tmp_path / "b.jsonl", *({"prompt": f"b{n}"} for n in range(3)))),
    ]
    found = read_prompts(sources, lambda _: ())
    dealt = Stream(found, 4).take(400)
    assert [number for number, _ in dealt] == list(range(400))
    texts = [str(prompt.messages[0]["content"]) for _, prompt in dealt]
    assert 250 < sum(text.startswith("a") for text in texts) < 350
    passes = [text for text in texts if text.startswith("b")]
    assert all(Counter(passes[at : at + 3]) == {"b0": 1, "b1": 1, "b2": 1} for at in range(0, len(passes) - 3, 3))
    later = Stream(found, 4)
    later.skip(150)
    assert later.take(250) == dealt[150:]
    assert later.dealt == 400
    assert Stream(found, 5).take(50) != dealt[:50]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"loss_type": "cispo"}, r"grpo\.epsilon_high=0\.2 contradicts grpo\.loss_type='cispo'"),
        ({"loss_type": "luspo"}, r"grpo\.loss_type='luspo' contradicts grpo\.ratio_level='token'"),
        ({"loss_type": "vespo", "importance_sampling": "sequence_mask"}, r"grpo\.loss_type='vespo' contradicts"),
        ({"importance_high": None}, r"grpo\.importance_low and grpo\.importance_high are both none"),
        ({"importance_low": 3.0}, r"grpo\.importance_low=3\.0 is not below grpo\.importance_high=2\.0"),
        ({"sync_every": 3}, r"grpo\.max_staleness=1 contradicts grpo\.sync_every=3.*2 updates old"),
        ({"iterations": 2, "overlap": True}, r"groups would be 3 updates old"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [{}, {"weight": 2.0}, {}]}, "prompts names source='captured' twice in the same words"),
        ({"prompts": [{"source": "a.jsonl", "kinds": ["count"]}]}, r"kinds=\['count'\] would be ignored"),
        ({"group_size": 1}, "greater than or equal to 2"),
    ],
)
def test_contradictions_name_both_keys(told: Json, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        GrpoSettings.model_validate(told)


def test_a_stage_of_a_recipe_says_it_all_in_its_table(tmp_path: Path) -> None:
    asked = rows(tmp_path / "asked.jsonl", {"prompt": "hi"})
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[[stages]]\nname = "play"\nkind = "grpo"\nmodules.language_model.rank = 8\n'
        '[stages.grpo]\nsteps = 3\nprompts = [{ source = "asked.jsonl", weight = 2.0 }, { source = "captured" }]\n'
        '[stages.reward]\nrewards = [{ name = "exact" }]\n'
    )
    stage = load_recipe(tmp_path / "mine.toml").stages[0]
    assert stage.grpo is not None
    assert stage.reward is not None
    assert [one.source for one in stage.grpo.prompts] == [asked, "captured"]
    assert (stage.grpo.steps, stage.reward.rewards[0].name) == (3, "exact")
    assert [stage.policies[module].policy for module in stage.policies] == ["frozen", "frozen", "lora"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"steps": 3}, "steps=3 would be ignored: a stage of kind='grpo' is told by its table `grpo`"),
        ({"data": [{"source": "scenes"}]}, r"would be ignored.*\(`grpo\.prompts`\)"),
        ({"modules": {"aligner": "full"}}, r"modules\.aligner\.policy='full' contradicts kind='grpo'"),
        ({"modules": {"language_model": "full"}}, r"modules\.language_model\.policy='full' contradicts GRPO"),
        ({"modules": {"language_model": {"dropout": 0.1}}}, r"modules\.language_model\.dropout=0\.1 contradicts GRPO"),
        ({"grpo": {"step": 3}}, r"stages\.play\.grpo\.step: unknown key"),
    ],
)
def test_what_a_stage_would_ignore_is_refused(told: Json, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        parse_recipe({"name": "mine", "stages": [{"name": "play", "kind": "grpo", **told}]})
    dpo = {"name": "dpo", "kind": "dpo", "steps": 1, "data": [{"source": "a.jsonl"}], "grpo": {}}
    with pytest.raises(SettingsError, match=r"stages\.dpo: grpo would be ignored: kind='dpo' samples nothing"):
        parse_recipe({"name": "mine", "stages": [dpo]})


def test_the_defaults_are_sound() -> None:
    train = TrainSettings()
    assert train.grpo == GrpoSettings()
    assert (train.grpo.micro, train.grpo.age) == (8, 0)


def test_a_recipe_survives_the_way_to_its_job() -> None:
    """`noria train run` hands it on without what is the default anyway."""
    stage = {
        "name": "play",
        "kind": "grpo",
        "grpo": {},
        "reward": {"rewards": [{"name": "exact"}, {"name": "repetition"}]},
    }
    made = parse_recipe({"name": "mine", "stages": [stage]})
    assert parse_recipe(made.model_dump(mode="json", exclude_defaults=True)) == made
