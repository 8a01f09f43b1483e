"""Recipes from files and from jobs.

Comes in: a TOML file, or the tree that a job kept. Goes out: a `Recipe`. Must not import torch.
A local path in the data is looked for beside the recipe first, and is kept whole: a job may go on elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from noria.errors import NotFound, SettingsError
from noria.methods.grpo import CAPTURED, PromptSource
from noria.module_settings import ModuleSettings
from noria.recipes.schema import DataSource, Recipe

BUILT_IN = ("scenes", "digits", "photos", "text", CAPTURED)  # sources that Noria draws, carries or keeps: never a path
Source = TypeVar("Source", DataSource, PromptSource)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe. Raises NotFound, or SettingsError with one line per wrong key: `FILE: stages.eyes.steps: ..`."""
    try:
        tree = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound(f"there is no recipe {path}", param="recipe") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}", param="recipe") from error
    recipe = parse_recipe(tree, where=str(path))
    beside = path.resolve().parent
    stages = tuple(
        stage.model_copy(
            update={
                "data": tuple(_found(one, beside) for one in stage.data),
                "grpo": stage.grpo
                and stage.grpo.model_copy(update={"prompts": tuple(_found(one, beside) for one in stage.grpo.prompts)}),
            }
        )
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from its tree. Raises SettingsError; `where` starts each line of it."""
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        lines, keys = [], []
        for one in error.errors():
            keys.append(_key(tree, one["loc"]))
            told = one["msg"].removeprefix("Value error, ")
            if one["type"] == "extra_forbidden":
                told = _unknown(str(one["loc"][-1]))
            lines.append(f"{where}: {keys[-1]}: {told}")
        raise SettingsError("\n".join(lines), param=keys[0]) from error


def _unknown(key: str) -> str:
    if key in ModuleSettings.model_fields:
        return f"unknown key; a module has it: modules.language_model.{key}, or of another module"
    return "unknown key (docs/recipes.md lists them)"


def _key(tree: Any, loc: tuple[int | str, ...]) -> str:
    """`stages.eyes.steps`: a stage by its name where it has one, else by its place, from 1."""
    words: list[str] = []
    for part in loc:
        inside = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        tree = tree[part] if inside else (tree.get(part) if isinstance(tree, Mapping) else None)
        named = tree.get("name") if inside and isinstance(tree, Mapping) else None
        words.append(str(named) if named else str(part + 1 if isinstance(part, int) else part))
    return ".".join(words) or "recipe"


def _found(one: Source, beside: Path) -> Source:
    if one.source in BUILT_IN or "://" in one.source or Path(one.source).is_absolute():
        return one
    for folder in (beside, Path.cwd()):
        if (folder / one.source).exists():
            return one.model_copy(update={"source": str((folder / one.source).resolve())})
    return one
