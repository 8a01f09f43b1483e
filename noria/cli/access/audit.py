"""`noria audit`: what operators did.

Comes in: the home's server, or its store where none runs. Goes out: lines, or JSON.
"""

from __future__ import annotations

from typing import Annotated

import typer

from noria.cli.context import AsJson, place, print_json, print_table, when

group = typer.Typer(no_args_is_help=True, help="What operators did.", epilog="Example: noria audit list")
OfKey = Annotated[str | None, typer.Option("--key", help="Only what was done with this key: key_..., settings, os.")]
OfAction = Annotated[str | None, typer.Option(help="Only this: create_job, rollback, revoke_key, ...")]


@group.callback()
def audit() -> None:
    """What operators did: who, what, on which, when, and how it ended."""


@group.command("list", epilog="Example: noria audit list --action rollback --json")
def list_events(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    key: OfKey = None,
    action: OfAction = None,
    as_json: AsJson = False,
) -> None:
    """The newest lines of the audit log, newest first."""
    found = place(ctx).ask(
        lambda client: client.audit_events(limit=limit, key_id=key, action=action),
        lambda store: [one.to_wire() for one in store.list_audit_events(limit=limit, key_id=key, action=action)],
    )
    if as_json:
        print_json(found)
        return
    columns = ("key_id", "name", "action", "target", "result", "wire")
    print_table(("at", "key", *columns[1:]), [(when(one["at"]), *(one.get(k) for k in columns)) for one in found])
