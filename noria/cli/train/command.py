"""`noria train` and `noria train run`: the trainer daemon in this process, or one recipe from first stage to version.

Comes in: flags and a recipe's file, which is checked here. Goes out: `python -m train`, which is never imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noria.cli.context import place
from noria.cli.run import become, flags_of
from noria.errors import InvalidRequest

group = typer.Typer(invoke_without_command=True, epilog="Example: noria train")


@group.callback()
def train(ctx: typer.Context) -> None:
    """Runs the trainer alone, in this process; it works on the home's jobs until it is stopped."""
    if ctx.invoked_subcommand is None:
        become(place(ctx), "train", [])


@group.command(epilog="Example: noria train run deploy/settings/recipes/llava.toml --rollout direct")
def run(
    ctx: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.toml", help="The recipe's file.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the job that was left, whichever it is.")
    ] = False,
    rollout: Annotated[str, typer.Option(help="none or direct: what follows the version.")] = "none",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that train one stage together. Default: train.processes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ended job as JSON.")] = False,
) -> None:
    """Trains by a recipe, here and now: its stages in order, then a version like any job's. Interrupted, it resumes."""
    if (recipe is None) != resume:
        raise InvalidRequest("name a recipe, or say --resume to go on with the job that was left", param="recipe")
    if rollout not in ("none", "direct"):
        raise InvalidRequest(f"--rollout {rollout!r} is neither none nor direct", param="rollout")
    words = ["run"]
    if recipe is not None:
        from noria.recipes import load_recipe

        load_recipe(recipe)  # said here, in one line and at once
        words.append(str(recipe))
    words += flags_of(rollout=rollout, processes=processes)
    words += [flag for flag, said in (("--resume", resume), ("--json", as_json)) if said]
    become(place(ctx), "train", words)
