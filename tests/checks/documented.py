"""The documentation rule: docstrings, settings, commands.

Every module says what it is; every public class and function has a docstring; every setting has a doc; every command
has a help text and an example that begins with its own name. Comes in: the code. Goes out: one line a breach.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from noria.cli.main import app
from noria.settings import Settings
from tests.checks.sizes import modules

PACKAGES = ("noria", "serve", "train", "proto")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(root: Path) -> Iterator[str]:
    """Modules, public classes and public functions without a docstring; in tests the modules only."""
    for path in modules(root):
        tree = ast.parse((root / path).read_text())
        if not tree.body and path.name == "__init__.py":
            continue
        if not ast.get_docstring(tree):
            yield f"{path}:1: the module has no docstring"
        if path.parts[0] in PACKAGES:
            yield from (f"{path}:{node.lineno}: {name} has no docstring" for name, node in _bare(tree.body, ""))


def _bare(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _is_variant(node):
            yield owner + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _bare(node.body, f"{owner}{node.name}.")


def _is_variant(node: Definition) -> bool:
    """An overload or a setter: its first definition carries the words."""
    marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
    return bool(marks & {"overload", "setter"})


def unexplained_settings(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Fields without a doc beneath them; a section's doc is its class's."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not kind.__doc__:
                yield f"setting {prefix}{name}: {kind.__name__} has no docstring"
            yield from unexplained_settings(kind, f"{prefix}{name}.")
        elif not field.description:
            yield f"setting {prefix}{name} has no doc beneath it"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name (`prefs export`), groups too."""
    yield from _walk(typer.main.get_command(app), "")


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix}{name} ")


def unhelpful_commands() -> Iterator[str]:
    """Commands without help, options without help, and examples that are missing or show another command."""
    for name, command in commands():
        if not command.help:
            yield f"command {name} has no help"
        if not re.match(rf"Example: noria {name}\b", command.epilog or ""):
            yield f"command {name} has no example `noria {name} ...` in its epilog"
        for param in command.params:
            if param.name != "help" and not getattr(param, "help", None):
                yield f"command {name}: {param.name} has no help"


def main() -> int:
    """Prints the breaches; 1 when there are any."""
    found = [*undocumented(Path.cwd()), *unexplained_settings(), *unhelpful_commands()]
    print("\n".join(found) or "documented: every module, public name, setting and command is explained")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
