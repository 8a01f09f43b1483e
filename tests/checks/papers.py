"""`docs/cli.md`, `docs/settings.md` and `docs/recipes.md`, made from the command line, the settings and the recipes.

`python -m tests.checks.papers` writes them; with `--check` it writes nothing and exits 1 when they are stale.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from noria.errors import WIRE
from noria.methods.grpo import GrpoSettings, PromptSource
from noria.module_settings import ModuleSettings
from noria.recipes import schema
from noria.rewards import RewardSettings
from noria.settings import Settings
from tests.checks.documented import commands

MADE = "<!-- made by `make docs`; do not edit -->"


def cli_page() -> str:
    """Every command with its example, arguments and options."""
    lines = [
        "Global options stand before the command: `noria --home DIR status`. `--home` is also `NORIA_HOME` (default "
        "`~/.noria`), `--url` is also `NORIA_URL` (default: where the home's own server says it is, else "
        "`server.http_port` here). Errors are one line on standard error.",
        "",
    ]
    for name, command in commands():
        lines += [
            f"## noria {name}",
            "",
            _text(command.help),
            "",
            "```",
            command.epilog.removeprefix("Example: "),
            "```",
            "",
        ]
        rows = [row for param in command.params if param.name != "help" for row in _param(param)]
        lines += [*rows, ""] if rows else []
    return _page("The command line", [*lines, *_exits()])


def settings_page() -> str:
    """Every setting with its default and doc."""
    lines = [
        "Flags win over `NORIA_*` environment variables, which win over `noria.toml` in the home. Environment names "
        "nest with two underscores: `NORIA_SERVER__HTTP_PORT=9000` is `http_port` under `[server]`. Unknown keys are "
        "refused. `noria config show` prints what is in force.",
        "",
    ]
    return _page("Settings", [*lines, *_section(Settings, "")])


def recipes_page() -> str:
    """Every key of a recipe with its default and doc."""
    lines = [
        "A recipe is a TOML file for `noria train run`; `deploy/settings/recipes/` has one for every family. Unknown "
        "keys, and keys that would be ignored, are refused. What its data may look like: [data.md](data.md). The "
        "losses of preference methods: [methods.md](methods.md).",
        *("", "```", 'name = "mine"', "", "[[stages]]", 'name = "look"', 'kind = "sft"', "steps = 200"),
        'data = [{ source = "rows.jsonl" }]',
        'modules.language_model = { policy = "lora", rank = 8 }',
        *("```", "", "## Kinds of stages", ""),
        *(line for line in (schema.__doc__ or "").splitlines() if line.startswith("|")),
        "",
    ]
    tables: list[tuple[str, type[BaseModel]]] = [
        ("The recipe", schema.Recipe),
        ("[[stages]]", schema.RecipeStage),
        ("data, a list of these", schema.DataSource),
        ("modules.vision_tower, .aligner, .language_model", ModuleSettings),
        *schema.LOSSES.items(),
        ("grpo (docs/grpo.md)", GrpoSettings),
        ("grpo.prompts, a list of these", PromptSource),
        ("reward (docs/rewards.md has what each reward takes)", RewardSettings),
    ]
    for title, model in tables:
        lines += [f"## {title}", "", _text(model.__doc__), "", *_table(model.model_fields), ""]
    return _page("Recipes", lines)


def _page(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"# {title}", "", MADE, "", *lines]).rstrip() + "\n"


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    plain = {name: field for name, field in model.model_fields.items() if not _is_section(field)}
    yield f"## [{prefix.rstrip('.')}]" if prefix else "## At the top"
    yield from ("", _text(model.__doc__), "")
    if plain:
        yield from (*_table(plain), "")
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from _section(typing.cast(type[BaseModel], field.annotation), f"{prefix}{name}.")


def _table(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    yield from ("| key | type | default | |", "|---|---|---|---|")
    yield from (
        f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description)} |"
        for name, field in fields.items()
    )


def _is_section(field: FieldInfo) -> bool:
    return _is_table(field.annotation)


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(one, key)}" for one in field.metadata for key, word in BOUNDS.items() if hasattr(one, key)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    """A type in words: `list of texts`, `"cosine" or "linear"`."""
    origin, inner = typing.get_origin(annotation), [one for one in typing.get_args(annotation) if one is not NoneType]
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(one)}`" for one in inner)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin is tuple:
        return f"list of {_kind(inner[0])}s"
    if origin is dict or _is_table(annotation):
        return "table"
    if origin is not None:
        return " or ".join(dict.fromkeys(_kind(one) for one in inner))
    return KINDS.get(getattr(annotation, "__name__", ""), str(annotation))


KINDS = {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "Path": "path", "SecretStr": "secret"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be said" if field.is_required() else "empty"
    if field.default is None:
        return "none"
    if isinstance(field.default, tuple) and any(isinstance(one, BaseModel) for one in field.default):
        return f"`{json.dumps([one.model_dump(exclude_none=True) for one in field.default])}`"
    return "its own" if isinstance(field.default, BaseModel) else f"`{json.dumps(field.default, default=str)}`"


def _param(param: Any) -> Iterator[str]:
    # A flag's name is its long option; an argument's is what the usage line shows.
    name = param.opts[-1] if param.param_type_name == "option" else str(param.metavar or param.name).upper()
    note = "" if not param.required else " Required."
    yield f"- `{name}`: {_text(param.help)}{note}"


def _exits() -> Iterator[str]:
    yield from ("## Exit status", "", "| status | when |", "|---|---|", "| 0 | all went well |")
    by_code: dict[int, list[str]] = {}
    for error, wire in WIRE.items():
        by_code.setdefault(wire.exit_code, []).append(_text(error.__doc__))
    yield from (f"| {code} | {_cell('; '.join(docs))} |" for code, docs in sorted(by_code.items()))
    yield "| 130 | Ctrl-C |"


def _text(doc: str | None) -> str:
    return " ".join((doc or "").split("\n\n")[0].split())


def _cell(doc: str | None) -> str:
    return _text(doc).replace("|", "\\|")


def main() -> int:
    """Writes the pages, or with `--check` says which are stale."""
    made = {"cli": cli_page, "settings": settings_page, "recipes": recipes_page}
    pages = {Path(f"docs/{name}.md"): make() for name, make in made.items()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        print(
            "\n".join(f"{path} is stale: run `make docs`" for path in stale)
            or "papers: docs/cli.md, settings.md and recipes.md are fresh"
        )
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path])
        print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
