"""`noria prefs`: stats, list, export, import, forget, prune. They work on the home's store; no server is needed.

Comes in: the home. Goes out: figures, lines, files. `forget` goes through the server when one runs on the home, so
that nothing which still waits for its commit survives.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import AsJson, Place, place, print_fields, print_json, print_table, say, shown, when
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
    """Writes every preference and feedback with completions and pictures as JSONL; `import` reads it without loss."""
    from noria.cli.prefs.transfer import counted, export

    here = place(ctx)
    with here.store() as store:
        counts = counted(store)
        judgements = counts["preferences"] + counts["feedback"]
        with _writing(file) as sink, _bar("exporting", judgements) as advance:
            for line in export(store, _blobs(here), counts, advance):
                sink.write(line)
    say(f"{counts['preferences']} preferences and {counts['feedback']} feedback exported")


@group.command("import", epilog="Example: noria prefs import preferences.jsonl")
def import_prefs(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="The file to read; - is standard input.")],
    as_json: AsJson = False,
) -> None:
    """Takes in an export, whole or not at all begun; what is here already stays, so a file may be imported twice."""
    from noria.access.audit import by_os_user
    from noria.cli.prefs.transfer import import_file

    here = place(ctx)
    with (
        here.store() as store,
        by_os_user(store, "import_preferences"),
        _reading(file) as source,
        _bar("importing", None) as advance,
    ):
        counts = import_file(store, _blobs(here), source, advance)
    if as_json:
        print_json(counts)
    else:
        print_fields(counts)


@group.command(epilog="Example: noria prefs forget --user u-17 --yes")
def forget(
    ctx: typer.Context,
    end_user: Annotated[str | None, typer.Argument(metavar="USER", help="The same as --user.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="The `user` of the requests.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deletes everything of one end user: completions, preferences and feedback on them, pictures of nobody else.

    Prints which versions were trained on it: what weights have learnt is not taken out of them.
    """
    if (end_user is None) == (user is None):
        raise InvalidRequest("name the end user once: --user U, or U alone", param="user")
    wanted = str(end_user or user)
    if not yes and not typer.confirm(f"Delete everything of {shown(repr(wanted))}?", err=True):
        raise typer.Exit(1)
    here = place(ctx)
    counts = _forget(here, wanted)
    if as_json:
        print_json(counts)
        return
    print_fields({key: value for key, value in counts.items() if isinstance(value, int) and value is not True})
    print_fields(_lineage(counts["lineage"]))


@group.command(epilog="Example: noria prefs prune --dry-run")
def prune(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would go, and delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deletes what is past retention (`privacy.retention_*`) now, and pictures that nothing refers to.

    A running server does the same in the background.
    """
    from noria.privacy import retention

    here = place(ctx)
    settings = here.settings().privacy
    with here.store() as store:
        counts = retention.RoundCounts()
        if dry_run:
            would = retention.past_retention(store, settings)
            counts = retention.RoundCounts(would.completions, would.preferences, would.feedback)
        else:
            retention.prune(store, _blobs(here), settings, counts)
        retention.sweep(store, _blobs(here), settings, counts, dry_run=dry_run)
    told = {"dry_run": dry_run, **asdict(counts)}
    if dry_run:
        del told["images"]  # which pictures go with their completions is known once those are gone
    if as_json:
        print_json(told)
    else:
        print_fields(told)


def _forget(here: Place, user: str) -> dict[str, Any]:
    counts: dict[str, Any] = here.ask(
        lambda client: client.forget_end_user(user), lambda store: _forget_in(store, _blobs(here), user)
    )
    return counts


def _forget_in(store: Store, blobs: Blobs, user: str) -> dict[str, Any]:
    from noria.access.audit import by_os_user

    with by_os_user(store, "forget_end_user"):  # without whom: the log must not remember what was to be forgotten
        counts: dict[str, Any] = dict(store.forget_end_user(user))
        dropped = store.drop_pictures(counts.pop("images"), blobs.delete)
    return {"id": user, "deleted": True, **counts, "images": dropped}


def _lineage(lineage: dict[str, Any]) -> dict[str, str]:
    """Who learnt from what was deleted, a line a version and job."""
    uses = {"version": lineage["versions"], "job": lineage["jobs"]}
    found = {
        f"in {kind} {one[kind]}": f"{one['state']}: " + ", ".join(f"{part} {n}" for part, n in one["uses"].items())
        for kind, rows in uses.items()
        for one in rows
    }
    if lineage["inherited"]:
        found["inherited by"] = ", ".join(lineage["inherited"])
    return found or {"in versions": "none"}


def _blobs(here: Place) -> Blobs:
    from noria.blobs import Blobs

    return Blobs(here.settings().blobs_url)


def _side(side: dict[str, Any]) -> str:
    return f"{side['completion_id']}#{side['index']}" if "completion_id" in side else "(text)"


@contextmanager
def _writing(file: str) -> Iterator[IO[bytes]]:
    """Standard output, or a file that appears whole or not at all. Raises InvalidRequest where none can be written."""
    if file == "-":
        yield sys.stdout.buffer
        return
    target = Path(file)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        sink = beside.open("wb")
    except OSError as error:
        raise InvalidRequest(f"cannot write {file}: {error.strerror}", param="file") from None
    try:
        with sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _reading(file: str) -> Iterator[IO[bytes]]:
    """The file; of standard input a copy, since it is read twice. Raises InvalidRequest when the file is not there."""
    if file == "-":
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield copy
        return
    try:
        source = Path(file).open("rb")  # noqa: SIM115 - closed below, outside the try
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}", param="file") from error
    with source:
        yield source


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Any]:
    """A progress bar on standard error; yields what takes the count so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
