"""What every command shares: the home, the server, and how results are printed.

Comes in: the global options. Goes out: `Place`, printing helpers, the exit status of an error.
Must not import httpx, pydantic or the store at import: `--help` must stay quick.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from noria.client import NoriaClient
    from noria.settings import Settings
    from noria.store import Store

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SERVER_FILE = "server.json"
UNSAFE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""C0 and C1 controls, line separators, bidirectional marks, lone surrogates."""


@dataclass(frozen=True)
class Place:
    """Where this command looks: `--home` or NORIA_HOME, and `--url` or NORIA_URL. None means not said."""

    home: Path | None = None
    url: str | None = None

    def settings(self, **flags: Any) -> Settings:
        """The settings in force. Raises SettingsError."""
        from noria.settings import load_settings

        return load_settings(home=self.home, url=self.url, **flags)

    def store(self) -> Store:
        """The home's store; the caller closes it. Makes the home when it is not there."""
        from noria.store import Store

        settings = self.settings()
        settings.home.mkdir(parents=True, exist_ok=True)
        return Store.open(settings.store_url)

    def client(self) -> NoriaClient:
        """A client of the server: at the named URL, else where the home's live server says, else its port here."""
        from noria.client import NoriaClient

        settings = self.settings()
        running = None if settings.url else live_server(settings.home)
        url = settings.url or (str(running["url"]) if running else settings.server.url_here(settings.server.http_port))
        return NoriaClient(url, api_key=settings.shown_key, trust=settings.trust)

    def ask(self, server: Callable[[NoriaClient], Any], store: Callable[[Store], Any]) -> Any:
        """What the server says or, where none is named and the home has none that runs, what its store says.

        A home that is not there is not made: the server's absence is then the error.
        """
        settings = self.settings()
        if settings.url or live_server(settings.home) or not settings.home.is_dir():
            with self.client() as client:
                return server(client)
        with self.store() as kept:
            return store(kept)


def place(ctx: typer.Context) -> Place:
    """The global options of this call."""
    found = ctx.find_object(Place)
    return found if found is not None else Place()


def live_server(home: Path) -> dict[str, Any] | None:
    """What the server of this home wrote when it was ready, or None when no such process lives."""
    try:
        told: dict[str, Any] = json.loads((home / SERVER_FILE).read_text())
        os.kill(int(told["pid"]), 0)
    except PermissionError:
        return told  # it lives, as another user
    except (OSError, ValueError, KeyError):
        return None
    return told


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json_text(data, indent=2))


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON in which no character moves a terminal's cursor: those stand as `\\u009b`, which is the same JSON."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, default=str)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}" if found[0] != "\n" else "\n", text)


def shown(value: object) -> str:
    """What people and models wrote, fit for a terminal: control characters, bidirectional marks and lone surrogates
    are spelt out (`\\x1b`), so that a name cannot clear the screen, retitle the window or forge a line.
    """
    return UNSAFE.sub(lambda found: _spelt(found[0]), str(value))


def _spelt(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns under their names; None shows as a dash. Never cut, so that a pipe gets all of it."""
    cells = [list(columns), *(["-" if cell is None else shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """One `name  value` line each; None shows as a dash, further lines of a value stand under its first."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        lines = ("-" if value is None else str(value)).split("\n")
        typer.echo(f"{name.ljust(width)}  {(chr(10) + ' ' * (width + 2)).join(map(shown, lines))}")


def say(text: str) -> None:
    """A line for people, on standard error."""
    print("\n".join(map(shown, text.split("\n"))), file=sys.stderr, flush=True)


def when(at: float | None) -> str | None:
    """A time as UTC to the second."""
    from datetime import UTC, datetime

    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def short(metrics: Mapping[str, Any], keys: Iterable[str]) -> str:
    """`key=value` for those of the keys that are there, numbers to four digits."""
    found = ((key, metrics[key]) for key in keys if metrics.get(key) is not None)
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in found)
