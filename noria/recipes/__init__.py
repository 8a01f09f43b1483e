"""Recipes: a list of training stages, each with its modules, data and schedule, in one TOML file.

Comes in: TOML. Goes out: a frozen `Recipe`, or an error that names file and key. Must not import torch.
"""

from noria.recipes.read import load_recipe, parse_recipe
from noria.recipes.schema import DataFormat, DataSource, Recipe, RecipeStage, StageKind

__all__ = ["DataFormat", "DataSource", "Recipe", "RecipeStage", "StageKind", "load_recipe", "parse_recipe"]
