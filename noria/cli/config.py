"""`noria config show`: the settings in force.

Comes in: `noria.toml`, environment. Goes out: TOML or JSON, secrets masked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import typer

from noria.cli.context import AsJson, place, print_json

_BARE = re.compile(r"[A-Za-z0-9_-]+")
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
            lines.append(f"# {key} is not set" if value is None else f"{key} = {_value(value)}")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_toml(value, f"{prefix}{key}.")]
    return lines


def _value(value: Any) -> str:
    """One value on one line. JSON's numbers, booleans and strings are TOML's too; a table inside a list is inline."""
    if isinstance(value, Mapping):
        told = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None)
        return f"{{{told}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)
