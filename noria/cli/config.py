"""`noria config show`: the settings in force.

Comes in: `noria.toml`, environment. Goes out: TOML or JSON, secrets masked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from noria.cli.context import AsJson, place, print_json

group = typer.Typer(no_args_is_help=True, help="Settings.", epilog="Example: noria config show")


@group.callback()
def config() -> None:
    """Settings."""


@group.command(epilog="Example: noria config show --json")
def show(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The settings as resolved from noria.toml, NORIA_* and flags; secrets masked. The text is valid TOML."""
    settings = place(ctx).settings()
    tree = settings.model_dump(mode="json")  # pydantic masks SecretStr in JSON mode
    if as_json:
        print_json(tree)
    else:
        typer.echo("\n".join(_toml(tree)))


def _toml(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The tree as TOML 1.0; what is unset (TOML has no null) becomes a comment."""
    lines = []
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            # JSON's numbers, booleans, strings and arrays of those are TOML's too
            lines.append(f"# {key} is not set" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_toml(value, f"{prefix}{key}.")]
    return lines
