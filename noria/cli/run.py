"""`noria serve`, `demo`: what replaces this process or fills it.

Comes in: flags. Goes out: `python -m serve` or `python -m train`, which are never imported here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from noria.cli.context import AsJson, Place, place

app = typer.Typer()

Host = Annotated[str | None, typer.Option(help="Address both wires bind to. Default: server.host.")]
HttpPort = Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one. Default: server.http_port.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without any key: docs/keys.md.")]
ASIDE = "Answer beside the home's server, over HTTP: nothing is made live, swapped, captured or registered."
GrpcPort = Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one. Default: server.grpc_port.")]


@app.command(epilog="Example: noria serve --http-port 8080 --model v2")
def serve(
    ctx: typer.Context,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    model: Annotated[str | None, typer.Option(help="A version, or a model's name. Default: the live one.")] = None,
    aside: Annotated[bool, typer.Option("--aside", help=ASIDE)] = False,
    insecure: Insecure = False,
) -> None:
    """Runs the server alone, in this process."""
    flags = flags_of(host=host, http_port=http_port, grpc_port=grpc_port, model=model)
    words = [word for word, said in (("--aside", aside), ("--insecure", insecure)) if said]
    become(place(ctx), "serve", [*flags, *words])


@app.command(epilog="Example: noria demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(help="Where table, picture and log go.")] = Path("demo-out"),
    home: Annotated[Path | None, typer.Option(help="The demo's home. Default: a fresh folder under --out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turns the whole loop once on the embedded model, and prints what it measured."""
    from noria.demo.main import run

    raise typer.Exit(run(out, home, as_json_text=as_json))


def become(here: Place, module: str, arguments: list[str]) -> NoReturn:
    """Replaces this process by `python -m MODULE`: signals and the exit status are then its own."""
    environment = environment_of(here)  # a wrong setting is said here, in one line
    sys.stdout.flush()
    os.execve(sys.executable, python_m(module, arguments), environment)  # noqa: S606 - our own interpreter and module


def python_m(module: str, arguments: list[str]) -> list[str]:
    """Runs one of our modules. -P: a folder named `serve` or `train` where the user stands is not it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment_of(here: Place) -> dict[str, str]:
    """Ours, with the home in force."""
    return {**os.environ, "NORIA_HOME": str(here.settings().home)}


def flags_of(**values: object) -> list[str]:
    """`http_port=1` as `["--http-port", "1"]`; what is None is left out."""
    given = ((key, value) for key, value in values.items() if value is not None)
    return [word for key, value in given for word in (f"--{key.replace('_', '-')}", str(value))]
