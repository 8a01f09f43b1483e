"""`noria versions`, `noria rollout`, `noria rollback`: which model answers.

Comes in: version ids. Goes out: the server's word on them, and a rollout followed to its end.
Must not import the store: these commands ask the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from noria.cli.context import AsJson, place, print_fields, print_json, print_table, say, short, when
from noria.errors import Conflict

if TYPE_CHECKING:
    from noria.client import NoriaClient
    from noria.client.shapes import Rollout
    from noria.records import Json

app = typer.Typer()
group = typer.Typer(invoke_without_command=True, epilog="Example: noria versions --json")
MEASURES = ("mean_kl", "agreement", "loss_first", "loss_last", "accuracy_last", "pairs")
NoWait = Annotated[bool, typer.Option("--no-wait", help="Ask for it, and do not wait for its end.")]


@group.callback()
def versions(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every published version; without a subcommand, a list of them."""
    if ctx.invoked_subcommand is None:
        _list(ctx, as_json)


@group.command("list", epilog="Example: noria versions list")
def list_versions(ctx: typer.Context, as_json: AsJson = False) -> None:
    """All versions, newest first."""
    _list(ctx, as_json)


@group.command(epilog="Example: noria versions show v2 --json")
def show(ctx: typer.Context, version: Annotated[str, typer.Argument(help="v2")], as_json: AsJson = False) -> None:
    """One version: where it comes from, what it measured, the hashes of its frozen modules, and of how many users that
    were forgotten since it had learnt.
    """
    with place(ctx).client() as client:
        found = client.version(version)
    if as_json:
        print_json(found)
        return
    frozen, forgotten = found.get("frozen") or {}, found.get("forgotten") or {}
    print_fields(
        {
            **{key: found.get(key) for key in ("id", "state", "parent", "method", "job")},
            "created": when(found.get("created_at")),
            "forgotten users": _forgotten(forgotten),
            **{f"frozen {name}": digest for name, digest in frozen.items()},
            **{f"measured {name}": value for name, value in flat(found.get("metrics") or {}).items()},
        }
    )


@app.command(epilog="Example: noria rollout v2")
def rollout(
    ctx: typer.Context,
    version: Annotated[str, typer.Argument(help="The version to put live: v2")],
    canary: Annotated[int | None, typer.Option(min=1, max=100, metavar="PCT", help="Not supported yet.")] = None,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Puts a version live, without dropping a request; on any failure the old one answers on."""
    with place(ctx).client() as client:
        strategy = "direct" if canary is None else "canary"
        begun = client.create_rollout(version, strategy=strategy, percent=canary)
        _follow(client, begun, no_wait, as_json)


@app.command(epilog="Example: noria rollback")
def rollback(ctx: typer.Context, no_wait: NoWait = False, as_json: AsJson = False) -> None:
    """Puts the version that was live before live again."""
    with place(ctx).client() as client:
        _follow(client, client.rollback(), no_wait, as_json)


def _list(ctx: typer.Context, as_json: bool) -> None:
    with place(ctx).client() as client:
        found = client.versions()
    if as_json:
        print_json(found)
        return
    print_table(
        ("version", "state", "parent", "method", "job", "created", "measured"),
        [
            (
                *(one.get(key) for key in ("id", "state", "parent", "method", "job")),
                when(one.get("created_at")),
                _measured(one.get("metrics") or {}),
            )
            for one in found
        ],
    )


def _forgotten(forgotten: Json) -> str:
    """How many users whose data it was trained on asked to be forgotten since, and how many its ancestors were."""
    uses = ", ".join(f"{part} {count}" for part, count in (forgotten.get("uses") or {}).items())
    inherited = forgotten.get("inherited", 0)
    return (
        f"{forgotten.get('users', 0)}"
        + (f" ({uses})" if uses else "")
        + (f"; inherited {inherited}" if inherited else "")
    )


def _measured(metrics: Json) -> str:
    return short({name.rpartition(" ")[2]: value for name, value in flat(metrics).items()}, MEASURES)


def flat(metrics: Json, under: str = "") -> Json:
    """Every figure by its words: an added model has its own under `quantize` and `verify`, a trained one at once."""
    found: Json = {}
    for name, value in metrics.items():
        found |= flat(value, f"{under}{name} ") if isinstance(value, dict) else {f"{under}{name}": value}
    return found


def _follow(client: NoriaClient, begun: Rollout, no_wait: bool, as_json: bool) -> None:
    """Waits for the rollout's end. Raises Conflict when it failed."""
    if not no_wait:
        say(f"rollout {begun['id']} of {begun['version']} ...")
        begun = client.wait_rollout(begun["id"])
    if as_json:
        print_json(begun)
    elif begun["state"] != "failed":
        pause_s = (begun.get("metrics") or {}).get("pause_s")
        paused = f", traffic waited {pause_s:.2f} s" if pause_s is not None else ""
        typer.echo(f"{begun['version']} {begun['state']}{paused} (before: {begun.get('previous') or 'none'})")
    if begun["state"] == "failed":
        raise Conflict(f"the rollout of {begun['version']} failed and the old version answers on: {begun['reason']}")
