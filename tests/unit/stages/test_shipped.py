"""Every shipped recipe runs on the tiny random model of its family: each stage for two steps, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noria.recipes import DataSource, Recipe, load_recipe
from tests.tiny_families import build_tiny_family
from tests.unit.stages.material import FILES, write_data
from train.stages.job import run_stage
from train.stages.run import Listener
from train.stages.spec import DELTA, StageRun

RECIPES = Path(__file__).parents[3] / "deploy/settings/recipes"
FAMILIES = {
    "llava": "llava",
    "llava-next": "llava_next",
    "llava-onevision": "llava_onevision",
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "internvl": "internvl",
    "idefics3": "idefics3",
    "finetune": "smolvlm",
    "preferences": "internvl",
}


def shrunk(recipe: Recipe, data: Path) -> Recipe:
    """The recipe with our rows, two steps a stage and batches of four; who trains, and how, stays."""
    stages = []
    for one in recipe.stages:
        sources = (DataSource(source=str(data / FILES.get(one.kind, "conversations.jsonl"))),)
        less: dict[str, Any] = {"data": sources, "steps": 2, "epochs": None, "batch_size": 4, "max_length": 512}
        less["micro_batch_size"] = 1 if one.packing else 2
        stages.append(one.model_copy(update=less))
    return recipe.model_copy(update={"stages": tuple(stages)})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_recipe_runs_on_its_family(name: str, tmp_path: Path) -> None:
    master = build_tiny_family(tmp_path / "master", FAMILIES[name])
    (tmp_path / "data").mkdir()
    recipe = shrunk(load_recipe(RECIPES / f"{name}.toml"), write_data(tmp_path / "data", 8))
    deltas: list[Path] = []
    for index, one in enumerate(recipe.stages):
        folder = tmp_path / recipe.folder_of(index)
        folder.mkdir()
        told = run_stage(StageRun(master, tuple(deltas), one, folder), Listener())
        trained = {module for module, row in told["modules"].items() if row["trainable"]}
        assert trained == {module for module, policy in one.policies.items() if policy.trains}, one.name
        assert (told["steps"], len(told["curve"])) == (2, 2)
        deltas.append(folder / DELTA)
    assert [path.parent.name for path in deltas] == [recipe.folder_of(n) for n in range(len(recipe.stages))]


def test_every_shipped_recipe_is_run_here() -> None:
    """The embedded model's own recipe is run where that model is grown."""
    assert {path.stem for path in RECIPES.glob("*.toml")} - {"embedded"} == set(FAMILIES)
