"""`noria model`: taking a checkpoint in, and training the embedded model's eyes anew.

Comes in: a folder, or a hub id that is downloaded first. Goes out: a process of `python -m train model ...`, which
quantises, verifies and publishes it. Must not import train.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from noria.cli.context import AsJson, place, print_json, print_table, say
from noria.cli.run import become, flags_of
from noria.errors import NotFound, Unavailable

group = typer.Typer(no_args_is_help=True, help="Take in a model.", epilog="Example: noria model add /models/llava")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OTHER_RECIPE = "Another recipe than the one by which the shipped eyes were made."
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles, no other frameworks' weights


@group.callback()
def model() -> None:
    """Take in a model: quantise it, verify it, publish it as a version."""


@group.command(epilog="Example: noria model add /models/llava-1.5-7b-hf --name llava")
def add(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="A checkpoint's folder, full precision or GPTQ, or a hub id.")],
    name: Annotated[str | None, typer.Option(help="Its name under masters/. Default: the folder's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Takes in a checkpoint: copies it, quantises it with GPTQ, verifies it, publishes it."""
    folder = fetched(source)
    extra = ["--json"] if as_json else []
    become(place(ctx), "train", ["model", "add", str(folder), *flags_of(name=name or name_of(source)), *extra])


@group.command("build-embedded", epilog="Example: noria model build-embedded --out eyes")
def build_embedded(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Where the eyes go. Default: eyes/ in the home.")] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="RECIPE.toml", help=OTHER_RECIPE)] = None,
    as_json: AsJson = False,
) -> None:
    """Trains the embedded model's eyes anew: blank model, recipe, export. Called again, it goes on where it was."""
    if recipe is not None:
        from noria.recipes import load_recipe

        load_recipe(recipe)  # said here, in one line and at once
    extra = ["--json"] if as_json else []
    become(place(ctx), "train", ["model", "build-embedded", *flags_of(out=out, recipe=recipe), *extra])


@group.command("list", epilog="Example: noria model list --json")
def list_models(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The full-precision checkpoints of this home, the embedded model among them once it was built."""
    masters = place(ctx).settings().masters_dir
    found = [_master(folder) for folder in sorted(masters.glob("*/")) if not folder.name.startswith(".")]
    if as_json:
        print_json(found)
    else:
        rows = [(one["name"], one["model_type"], f"{one['bytes'] / 2**30:.2f} GiB") for one in found]
        print_table(("model", "type", "size"), rows)


def name_of(source: str) -> str:
    """The name under masters/ of a checkpoint that is given no other."""
    return Path(source).resolve().name


def fetched(source: str) -> Path:
    """The checkpoint's folder, downloaded to the hub's own cache where a hub id is given.

    Raises NotFound for what is neither a folder nor like a hub id, Unavailable when the download fails.
    """
    if Path(source).is_dir():
        return Path(source).resolve()
    if not HUB_ID.fullmatch(source):
        raise NotFound(f"{source} is neither a folder nor a hub id like org/name", param="source")
    hub = importlib.import_module("huggingface_hub")
    say(f"{source} is no folder here: downloading it from the hub")
    try:
        return Path(str(hub.snapshot_download(source, allow_patterns=WANTED)))
    except (OSError, ValueError) as error:  # the hub's own errors are both of these
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"{source} could not be downloaded: {first}") from error


def _master(folder: Path) -> dict[str, Any]:
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        model_type = None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    told = {"name": folder.name, "path": str(folder), "model_type": model_type, "bytes": size}
    return {**told, "eyes": _eyes(folder)}


def _eyes(folder: Path) -> str | None:
    """The hash of the eyes that an embedded model was given."""
    try:
        eyes: str | None = json.loads((folder / "noria.json").read_text()).get("eyes")
    except (OSError, ValueError):
        return None
    return eyes
