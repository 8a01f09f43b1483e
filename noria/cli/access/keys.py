"""`noria keys`: made, listed, rotated, revoked, in the home's store; no server is needed, and one that runs follows.

Comes in: names, roles, ids. Goes out: a key's text, once, on standard output; each change is a line of the audit log.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import AsJson, place, print_json, print_table, say, when

if TYPE_CHECKING:
    from noria.access.keys import ApiKey

group = typer.Typer(no_args_is_help=True, help="API keys.", epilog="Example: noria keys list")
Key = Annotated[str, typer.Argument(metavar="KEY", help="Its id (key_...), its name, or the key itself.")]
Roles = Annotated[
    list[str], typer.Option("--role", metavar="ROLE", help="client, annotator, operator or trainer; may be repeated.")
]


@group.callback()
def keys() -> None:
    """API keys: made, listed, rotated, revoked. A server that runs follows within two seconds."""


@group.command(epilog="Example: noria keys create shop --role client --expires-days 90")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it; no other key that is not revoked may be called so.")],
    role: Roles,
    expires_days: Annotated[float | None, typer.Option(min=0.0, help="Days it is good for. Default: ever.")] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a key and prints it: this once, for only its hash is kept. From the first on, every call needs one."""
    from noria.access.audit import by_os_user

    with place(ctx).store() as store, by_os_user(store, "create_key", name) as noted:
        first = not store.has_keys()
        expires_at = None if expires_days is None else time.time() + expires_days * 86_400
        made, text = store.create_key(name, role, expires_at)
        noted.target = made.id
    if first:
        say("this is the first key: from now on the server asks every caller for one")
    _show_once(made, text, as_json)


@group.command("list", epilog="Example: noria keys list --json")
def list_keys(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every key that ever was, with its roles and its last use, to the minute."""
    with place(ctx).store() as store:
        found = [one.to_wire(time.time()) for one in store.list_keys()]
    if as_json:
        print_json(found)
        return
    print_table(
        ("key", "name", "state", "roles", "created", "last used", "expires"),
        [
            (
                *(one["id"], one["name"], one["state"], ",".join(one["roles"])),
                *(when(one[key]) for key in ("created_at", "last_used_at", "expires_at")),
            )
            for one in found
        ],
    )


@group.command(epilog="Example: noria keys rotate shop --overlap 60")
def rotate(
    ctx: typer.Context,
    key: Key,
    overlap: Annotated[float, typer.Option(min=0.0, help="Minutes that the secret before is still taken.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Gives a key another secret and prints it, this once; id, name and roles stay."""
    from noria.access.audit import by_os_user
    from noria.access.keys import id_meant

    key = id_meant(key) or key
    with place(ctx).store() as store, by_os_user(store, "rotate_key", key) as noted:
        made, text = store.rotate_key(key, overlap * 60)
        noted.target = made.id
    _show_once(made, text, as_json)


@group.command(epilog="Example: noria keys revoke shop")
def revoke(ctx: typer.Context, key: Key, as_json: AsJson = False) -> None:
    """Ends a key for good. Answers that are being given on it go on to their end."""
    from noria.access.audit import by_os_user
    from noria.access.keys import id_meant

    key = id_meant(key) or key  # a leaked key's text will do: it must not reach the log
    with place(ctx).store() as store, by_os_user(store, "revoke_key", key) as noted:
        ended = store.revoke_key(key)
        noted.target = ended.id
    if as_json:
        print_json(ended.to_wire(time.time()))
    else:
        typer.echo(f"{ended.id} ({ended.name}) is revoked")


def _show_once(key: ApiKey, text: str, as_json: bool) -> None:
    if as_json:
        told: dict[str, Any] = {**key.to_wire(time.time()), "key": text}
        print_json(told)
        return
    say(f"{key.id} ({key.name}), {', '.join(key.roles)}; it is not shown again:")
    typer.echo(text)
