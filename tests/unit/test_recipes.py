"""Recipes: what they may say, what they refuse and how, and every one that is shipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from noria.errors import NotFound, SettingsError
from noria.methods.preferences import SETTINGS
from noria.methods.table import PREFERENCE_KINDS
from noria.recipes import load_recipe, parse_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "deploy/settings/recipes").glob("*.toml"))
FAMILIES = ("llava", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "idefics3")
HEAD = 'name = "mine"\n[[stages]]\nname = "eyes"\n'


def tree(kind: str = "sft", **more: Any) -> dict[str, Any]:
    said = {"name": "eyes", "kind": kind, "data": [{"source": "rows.jsonl"}], "steps": 3, **more}
    return {"name": "mine", "stages": [{key: value for key, value in said.items() if value is not None}]}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vision", [("full", 1e-4), ("frozen", 0), ("frozen", 0)]),
        ("align", [("frozen", 0), ("full", 1e-3), ("frozen", 0)]),
        ("sft", [("frozen", 0), ("full", 2e-5), ("lora", 1e-4)]),
        *((kind, [("frozen", 0), ("frozen", 0), ("lora", 5e-5)]) for kind in PREFERENCE_KINDS),
        ("finetune", [("full", 1e-6), ("full", 1e-6), ("full", 1e-6)]),
    ],
)
def test_a_kind_says_who_trains(kind: str, expected: list[tuple[str, float]]) -> None:
    policies = parse_recipe(tree(kind)).stages[0].policies
    assert [(one.policy, one.learning_rate) for one in policies.values()] == expected


def test_what_is_said_of_one_module_leaves_the_others_as_they_are() -> None:
    policies = parse_recipe(tree(modules={"aligner": "lora"})).stages[0].policies
    assert [one.policy for one in policies.values()] == ["frozen", "lora", "lora"]
    policies = parse_recipe(tree(only="aligner")).stages[0].policies
    assert [one.policy for one in policies.values()] == ["frozen", "full", "frozen"]


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("sft", {"epochs": 1}, r"recipe: stages\.eyes: say either steps or epochs"),
        ("sft", {"steps": None}, r"say either steps or epochs"),
        ("sft", {"learning_rate": 1e-4}, r"eyes\.learning_rate: unknown key; a module has it: modules\.language_model"),
        ("sft", {"stepz": 1}, r"recipe: stages\.eyes\.stepz: unknown key \(docs/recipes\.md lists them\)"),
        ("nothing", {}, r"recipe: stages\.eyes\.kind: Input should be 'vision'"),
        (
            "sft",
            {"only": "aligner", "modules": {"aligner": "lora"}},
            r"aligner\.policy='lora'.*only=\"aligner\"",
        ),
        ("dpo", {"modules": {"vision_tower": "full"}}, r"modules\.vision_tower\.policy='full' contradicts kind='dpo'"),
        ("vision", {"modules": {"language_model": "lora"}}, r"language_model\.policy='lora' contradicts kind='vision'"),
        (
            "align",
            {"modules": {"aligner": "frozen", "language_model": "lora"}},
            r"nothing would train.*aligner",
        ),
        ("sft", {"modules": {"vision_tower": {"rank": 4}}}, r"modules\.vision_tower\.rank=4 contradicts"),
        ("vision", {"packing": True}, r"packing=True would be ignored: kind='vision'"),
        ("sft", {"beta": 0.1}, r"beta=0\.1 would be ignored: kind='sft' has no reference"),
        ("simpo", {"beta": 0.1}, r"beta=0\.1 would be ignored: kind='simpo' has a table of its own"),
        ("simpo", {"dpo": {"beta": 0.1}}, r"dpo would be ignored: kind='simpo' has another loss"),
        ("sft", {"kto": {"beta": 0.1}}, r"kto would be ignored: kind='sft' has another loss"),
        ("mpo", {"mpo": {"gamma": 0.1}}, r"stages\.eyes\.mpo\.gamma: unknown key"),
        ("dpo", {"beta": 0.1, "dpo": {"beta": 0.2}}, r"beta=0\.1 and dpo\.beta=0\.2 say the same twice"),
        (
            "dpo",
            {"dpo": {"loss_type": "ipo", "label_smoothing": 0.1}},
            r"dpo\.label_smoothing=0\.1.*dpo\.loss_type='ipo'",
        ),
        ("kto", {"micro_batch_size": 1}, r"micro_batch_size=1 contradicts kind='kto'"),
        ("kto", {"batch_size": 1}, r"batch_size=1 contradicts kind='kto'"),
        ("kto", {"modules": {"vision_tower": "full"}}, r"vision_tower\.policy='full' contradicts kind='kto'"),
        ("orpo", {"packing": True}, r"packing=True would be ignored: kind='orpo'"),
        ("dpo", {"precision": "bfloat16"}, r"precision='bfloat16' would be ignored: kind='dpo'"),
        ("sft", {"precision": "float16"}, r"stages\.eyes\.precision: Input should be 'auto'"),
        ("sft", {"decay_ratio": 0.2}, r"decay_ratio=0\.2 would be ignored: the kind's own schedule"),
        ("sft", {"schedule": "cosine", "decay_ratio": 0.2}, r"would be ignored: schedule='cosine'"),
        (
            "sft",
            {"schedule": "constant-linear", "warmup_ratio": 0.6, "decay_ratio": 0.5},
            r"warmup_ratio=0\.6 and decay_ratio=0\.5 are more than the whole stage",
        ),
        ("sft", {"packing": True, "group_by_length": True}, r"packing and group_by_length contradict"),
        ("sft", {"packing": True, "keep_language": 1.0}, r"packing and keep_language contradict"),
        ("vision", {"keep_language": 1.0}, r"keep_language=1\.0 would be ignored: kind='vision'"),
        (
            "sft",
            {"keep_language": 1.0, "modules": {"language_model": "full"}},
            r"keep_language=1\.0 contradicts modules\.language_model\.policy='full'",
        ),
        ("sft", {"batch_size": 6, "micro_batch_size": 4}, r"batch_size=6 is not a multiple of micro_batch_size=4"),
        ("sft", {"data": []}, r"stages\.eyes: data is empty"),
    ],
)
def test_what_contradicts_itself_is_refused_by_key(kind: str, more: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        parse_recipe(tree(kind, **more))


def test_a_recipe_names_its_file_and_keeps_whole_paths(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    path = tmp_path / "mine.toml"
    data = '[{ source = "rows.jsonl" }, { source = "s3://b/rows.jsonl" }, { source = "scenes", count = 4 }]'
    path.write_text(HEAD + f'kind = "sft"\nepochs = 1\ndata = {data}\n')
    sources = [one.source for one in load_recipe(path).stages[0].data]
    assert sources == [str(tmp_path / "rows.jsonl"), "s3://b/rows.jsonl", "scenes"]
    path.write_text(HEAD + 'kind = "sft"\nepochs = -1\ndata = [{ source = "rows.jsonl" }]\n')
    with pytest.raises(
        SettingsError, match=r"mine\.toml: stages\.eyes\.epochs: Input should be greater than 0"
    ) as error:
        load_recipe(path)
    assert error.value.param == "stages.eyes.epochs"
    path.write_text("name = ")
    with pytest.raises(SettingsError, match=r"mine\.toml: not TOML"):
        load_recipe(path)
    with pytest.raises(NotFound, match=r"no recipe .*gone\.toml"):
        load_recipe(tmp_path / "gone.toml")


def test_quantisation_and_verification_are_checked_and_stages_differ_in_name() -> None:
    assert parse_recipe({**tree(), "quantize": {"group_size": 64}}).quantize == {"group_size": 64}
    with pytest.raises(SettingsError, match=r"quantize"):
        parse_recipe({**tree(), "quantize": {"group_sise": 64}})
    with pytest.raises(SettingsError, match=r"two stages are named 'eyes'"):
        parse_recipe({"name": "mine", "stages": tree()["stages"] * 2})


def test_a_recipe_survives_its_job() -> None:
    recipe = parse_recipe(tree(modules={"language_model": {"rank": 4, "learning_rate": 1e-3}}, packing=True))
    again = parse_recipe(recipe.model_dump(mode="json", exclude_defaults=True))
    assert again == recipe
    assert again.stages[0].micro == 1


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_a_preference_stage_has_its_methods_loss(kind: Any) -> None:
    """The defaults are those of the settings; a table changes it."""
    stage = parse_recipe(tree(kind)).stages[0]
    told = stage.loss.model_dump()
    assert stage.loss.method == kind
    assert told.items() <= SETTINGS[kind]().model_dump().items()
    assert parse_recipe(tree(kind, **{kind: {"beta": 0.7}})).stages[0].loss.model_dump() == {**told, "beta": 0.7}


def test_beta_of_a_dpo_stage_is_short_for_its_table() -> None:
    stage = parse_recipe(tree("dpo", beta=0.7, dpo={"loss_type": "hinge"})).stages[0]
    assert stage.loss.model_dump(exclude_none=True) == {"loss_type": "hinge", "beta": 0.7, "nll_weight": 0.0}


def test_every_family_has_a_recipe() -> None:
    assert set(FAMILIES) <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_one(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert all(stage.batch_size % stage.micro == 0 for stage in recipe.stages)


def test_recipes_import_nothing_heavy() -> None:
    code = "import sys, noria.recipes; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
