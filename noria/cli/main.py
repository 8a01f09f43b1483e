"""`noria`: puts the commands together, and turns every error into one line and an exit status.

Comes in: the arguments. Goes out: the exit status of `noria.errors.WIRE`, 0 when all went well, 130 on Ctrl-C.
Must not import torch, vllm, fastapi, sqlalchemy or httpx, nor anything that does: `--help` must stay quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from noria import __version__
from noria.cli import config, jobs, models, operate, run, versions
from noria.cli.access import audit, keys
from noria.cli.context import Place, say
from noria.cli.doctor import command as doctor
from noria.cli.eval import command as eval_
from noria.cli.prefs import command as prefs
from noria.cli.sample import command as sample
from noria.cli.train import command as train
from noria.cli.up import command as up
from noria.errors import NoriaError, wire_of

INTERRUPTED = 130

app = typer.Typer(
    name="noria",
    help="Serves a vision-language model and keeps getting better from its use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(up.app)
app.add_typer(run.app)
app.add_typer(train.group, name="train")
app.add_typer(operate.app)
app.add_typer(versions.app)
app.add_typer(versions.group, name="versions")
app.add_typer(jobs.app)
app.add_typer(jobs.group, name="jobs")
app.add_typer(prefs.group, name="prefs")
app.add_typer(eval_.app)
app.add_typer(sample.app)
app.add_typer(models.group, name="model")
app.add_typer(keys.group, name="keys")
app.add_typer(audit.group, name="audit")
app.add_typer(config.group, name="config")
app.add_typer(doctor.app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    home: Annotated[
        Path | None, typer.Option(envvar="NORIA_HOME", help="Settings, store, pictures, models. Default: ~/.noria.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(envvar="NORIA_URL", help="The server. Default: the home's own, else server.http_port here."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Serves a vision-language model and keeps getting better from its use."""
    ctx.obj = Place(home, url)


def call(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; errors are one line on standard error."""
    try:
        app(list(arguments), prog_name="noria")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except NoriaError as error:
        say("noria: " + "; ".join(error.message.splitlines()))
        return wire_of(error).exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0
    except Exception as error:  # the process edge: a person sees one line, not a traceback
        if os.environ.get("NORIA_TRACEBACK"):
            raise
        say(f"noria: {type(error).__name__}: {error} (a bug; NORIA_TRACEBACK=1 shows where)")
        return 1
    return 0


def main() -> None:
    """The console script."""
    sys.exit(call(sys.argv[1:]))
