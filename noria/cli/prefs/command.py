"""`noria prefs`: stats, list, export, import, forget. They work on the home's store; no server is needed.

Comes in: the home. Goes out: figures, lines, files. `forget` goes through the server when one runs on the home, so
that nothing which still waits for its commit survives.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import AsJson, Place, place, print_fields, print_json, print_table, say, when
from noria.errors import InvalidRequest

if TYPE_CHECKING:
    from noria.blobs import Blobs
    from noria.store import Store

group = typer.Typer(no_args_is_help=True, help="Preferences.", epilog="Example: noria prefs stats")


@group.callback()
def prefs() -> None:
    """What people preferred: counted, listed, exported, imported, forgotten."""


@group.command(epilog="Example: noria prefs stats --json")
def stats(ctx: typer.Context, as_json: AsJson = False) -> None:
    """How many preferences there are, by verdict, source and annotator, and how many no job has used."""
    with place(ctx).store() as store:
        counts = store.preference_counts()
        verdicts, sources, annotators = Counter[str](), Counter[str](), Counter[str]()
        for one in store.iter_preferences():
            verdicts[one.verdict] += 1
            sources[one.source] += 1
            annotators[one.annotator or "-"] += 1
    told: dict[str, Any] = {**counts, "verdicts": dict(verdicts), "sources": dict(sources)}
    if as_json:
        print_json({**told, "annotators": dict(annotators.most_common())})
        return
    most = ", ".join(f"{name} {count}" for name, count in annotators.most_common(10))
    spread = {name: ", ".join(f"{k} {v}" for k, v in told[name].items()) or "-" for name in ("verdicts", "sources")}
    print_fields({**counts, **spread, "annotators": f"{len(annotators)}: {most}" if annotators else "-"})


@group.command("list", epilog="Example: noria prefs list --limit 50 --annotator u-17")
def list_prefs(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    annotator: Annotated[str | None, typer.Option(help="Those of one annotator only.")] = None,
    as_json: AsJson = False,
) -> None:
    """The newest preferences, newest first."""
    with place(ctx).store() as store:
        found = [one.to_wire() for one in store.list_preferences(limit=limit, annotator=annotator)]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            *(one["id"], when(one["created_at"]), one["verdict"]),
            *(_side(one["chosen"]), _side(one["rejected"])),
            *(one["annotator"], one["source"]),
        )
        for one in found
    ]
    print_table(("preference", "created", "verdict", "chosen", "rejected", "annotator", "source"), rows)


@group.command("export", epilog="Example: noria prefs export preferences.jsonl")
def export_prefs(
    ctx: typer.Context, file: Annotated[str, typer.Argument(help="The file to write; - is standard output.")]
) -> None:
    """Writes every preference with its completions and pictures as JSONL; `import` reads it without loss."""
    from noria.cli.prefs.transfer import export_lines

    here = place(ctx)
    with (
        here.store() as store,
        _writing(file) as sink,
        _bar("exporting", store.preference_counts()["total"]) as advance,
    ):
        written = 0
        for line, is_preference in export_lines(store, _blobs(here)):
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            if is_preference:
                written += 1
                advance(written)
    say(f"{written} preferences exported")


@group.command("import", epilog="Example: noria prefs import preferences.jsonl")
def import_prefs(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="The file to read; - is standard input.")],
    as_json: AsJson = False,
) -> None:
    """Takes in an export; what is here already stays as it is, so a file may be imported twice."""
    from noria.access.audit import by_os_user
    from noria.cli.prefs.transfer import import_lines

    here = place(ctx)
    with (
        here.store() as store,
        by_os_user(store, "import_preferences"),
        _reading(file) as (source, lines),
        _bar("importing", lines) as advance,
    ):
        counts = import_lines(store, _blobs(here), source, advance)
    if as_json:
        print_json(counts)
    else:
        print_fields(counts)


@group.command(epilog="Example: noria prefs forget u-17 --yes")
def forget(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(help="The `user` of the requests.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deletes everything of one end user: completions, preferences and feedback on them, pictures of nobody else."""
    if not yes and not typer.confirm(f"Delete everything of {user!r}?", err=True):
        raise typer.Exit(1)
    here = place(ctx)
    counts = _forget(here, user)
    if as_json:
        print_json(counts)
    else:
        print_fields({key: value for key, value in counts.items() if isinstance(value, int) and value is not True})


def _forget(here: Place, user: str) -> dict[str, Any]:
    counts: dict[str, Any] = here.ask(
        lambda client: client.forget_end_user(user), lambda store: _forget_in(store, _blobs(here), user)
    )
    return counts


def _forget_in(store: Store, blobs: Blobs, user: str) -> dict[str, Any]:
    from noria.access.audit import by_os_user

    with by_os_user(store, "forget_end_user"):  # without whom: the log must not remember what was to be forgotten
        counts: dict[str, Any] = dict(store.forget_end_user(user))
        images = counts.pop("images", [])
        for sha256 in images:
            blobs.delete(sha256)
    return {"id": user, "deleted": True, **counts, "images": len(images)}


def _blobs(here: Place) -> Blobs:
    from noria.blobs import Blobs

    return Blobs(here.settings().blobs_url)


def _side(side: dict[str, Any]) -> str:
    return f"{side['completion_id']}#{side['index']}" if "completion_id" in side else "(text)"


@contextmanager
def _writing(file: str) -> Iterator[IO[str]]:
    """Standard output, or a file that appears whole or not at all. Raises InvalidRequest where none can be written."""
    if file == "-":
        yield sys.stdout
        return
    target = Path(file)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        sink = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write {file}: {error.strerror}", param="file") from None
    try:
        with sink:
            yield sink
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _reading(file: str) -> Iterator[tuple[IO[str], int | None]]:
    """The lines, and how many there are where that can be known. Raises InvalidRequest when the file is not there."""
    if file == "-":
        yield sys.stdin, None
        return
    try:
        with Path(file).open("rb") as counted:
            lines = sum(1 for _ in counted)
        source = Path(file).open(encoding="utf-8")  # noqa: SIM115 - closed below, outside the try
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}", param="file") from error
    with source:
        yield source, lines


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Any]:
    """A progress bar on standard error; yields what takes the count so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
