"""`noria up`, `serve`, `train`, `model`, `demo`: what starts processes.

Comes in: flags. Goes out: processes of `python -m serve` and `python -m train`, which are never imported here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from noria.cli.context import SERVER_FILE, AsJson, Place, live_server, place, print_json, say
from noria.errors import Conflict, TrainingError

app = typer.Typer()
model_group = typer.Typer(no_args_is_help=True, help="Take in a model.", epilog="Example: noria model add PATH")

Host = Annotated[str | None, typer.Option(help="Address both wires bind to. Default: server.host.")]
HttpPort = Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one. Default: server.http_port.")]
GrpcPort = Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one. Default: server.grpc_port.")]
VERSION = re.compile(r"v[0-9]+")
MODEL = "A version (v2), or on an empty home a checkpoint to take in: a folder or a hub id. Default: live, or embedded."


@app.command(epilog="Example: noria up --model /models/llava-1.5-7b-hf --http-port 8080")
def up(
    ctx: typer.Context,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    as_json: AsJson = False,
) -> None:
    """Runs the server and the trainer; with no model named, builds the embedded one the first time."""
    here = place(ctx)
    settings = here.settings(server=_given(host=host, http_port=http_port, grpc_port=grpc_port) or None)
    settings.home.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.home):
        status = _up(here, settings, model, as_json)
    raise typer.Exit(status)


@app.command(epilog="Example: noria serve --http-port 8080 --model v2")
def serve(
    ctx: typer.Context,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    model: Annotated[str | None, typer.Option(help="A version. Default: the live one.")] = None,
) -> None:
    """Runs the server alone, in this process."""
    flags = _flags(host=host, http_port=http_port, grpc_port=grpc_port, model=model)
    _become(place(ctx), "serve", flags)


@app.command(epilog="Example: noria train")
def train(ctx: typer.Context) -> None:
    """Runs the trainer alone, in this process; it works on the home's jobs until it is stopped."""
    _become(place(ctx), "train", [])


@model_group.callback()
def model_root() -> None:
    """Take in a model: quantise it, verify it, publish it as a version."""


@model_group.command("add", epilog="Example: noria model add /models/llava-1.5-7b-hf --name llava")
def add(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="A folder with a full-precision checkpoint, or a hub id.")],
    name: Annotated[str | None, typer.Option(help="Its name under masters/. Default: the folder's.")] = None,
) -> None:
    """Takes in a checkpoint: copies it, quantises it with GPTQ, verifies it, publishes it."""
    _become(place(ctx), "train", ["model", "add", source, *_flags(name=name)])


@model_group.command("list", epilog="Example: noria model list --json")
def list_models(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The full-precision checkpoints of this home, and the embedded model when it was built."""
    masters = place(ctx).settings().masters_dir
    found = [_master(folder) for folder in sorted(masters.glob("*/")) if not folder.name.startswith(".")]
    if as_json:
        print_json(found)
    else:
        for one in found:
            typer.echo(f"{one['name']}  {one['model_type']}  {one['bytes'] / 2**30:.2f} GiB")


@app.command(epilog="Example: noria demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(help="Where table, picture and log go.")] = Path("demo-out"),
    home: Annotated[Path | None, typer.Option(help="The demo's home. Default: a fresh folder under --out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turns the whole loop once on the embedded model, and prints what it measured."""
    from noria.demo.main import run

    raise typer.Exit(run(out, home, as_json_text=as_json))


def _up(here: Place, settings: Any, model: str | None, as_json: bool) -> int:
    from noria.cli.supervisor import Child, Stop, Supervisor, run_once

    stop = Stop()
    stop.listen()
    environment = _environment(here)
    take_in = _taking_in(here, model)
    if take_in is not None:
        say("no model yet: " + ("the embedded one is built" if take_in[-1] == "embedded" else f"{model} is taken in"))
        builder = Child("builder", python_m("train", take_in), environment)
        status = run_once(builder, stop, stop_s=30.0)
        if stop.asked:
            return 0
        if status:
            raise TrainingError(f"the model was not built (status {status}); why is said above")
        model = None
    ports = {"host": settings.server.host, "http_port": settings.server.http_port}
    flags = _flags(**ports, grpc_port=settings.server.grpc_port, model=model)
    server = Child("server", python_m("serve", flags), environment)
    trainer = Child("trainer", python_m("train", []), environment)
    announce = _Announcer(server, settings.home, as_json)
    return Supervisor(
        [server, trainer], stop, stop_s=settings.server.shutdown_s + 40.0, tell=say, watch=announce.look
    ).run()


class _Announcer:
    """Says once where the server is, and makes a restarted one take the same ports."""

    def __init__(self, server: Any, home: Path, as_json: bool) -> None:
        self._server = server
        self._home = home
        self._as_json = as_json
        self._told = False

    def look(self) -> None:
        """Cheap; called often."""
        if self._told or not self._server.running:
            return
        ready = live_server(self._home)
        if ready is None or ready["pid"] != self._server.process.pid:
            return
        self._told = True
        self._keep_ports(ready)
        if self._as_json:
            print_json(ready)
        else:
            where = f"{ready['url']}/v1 (OpenAI), {ready['url']}/noria/v1, gRPC {ready.get('grpc')}"
            typer.echo(f"noria is up: {where}, version {ready.get('version')}")
        sys.stdout.flush()

    def _keep_ports(self, ready: dict[str, Any]) -> None:
        command = self._server.command
        for flag, told in (("--http-port", ready["url"]), ("--grpc-port", ready.get("grpc"))):
            port = re.search(r":([0-9]+)/?$", str(told))
            if port and flag in command:
                command[command.index(flag) + 1] = port.group(1)


def _taking_in(here: Place, model: str | None) -> list[str] | None:
    """The arguments for `python -m train` that make the first version; None when there is a live one to serve.

    Raises Conflict when a checkpoint is named and the home already has a model.
    """
    with here.store() as store:
        live, some = store.live(), store.list_versions()
    named = model is not None and not VERSION.fullmatch(model)
    if live is None and not (some and model and not named):
        return ["model", "add", str(model)] if named else ["model", "embedded"]
    if named and not _same_model(here, str(model)):
        raise Conflict(
            f"this home already serves {live}; to serve {model}, take another home (--home), "
            f"or `noria model add {model}` and roll that version out",
            param="model",
        )
    return None


def _same_model(here: Place, model: str) -> bool:
    """Whether the live lineage began with this checkpoint: `up --model PATH` may be said at every start."""
    name = Path(model).name
    return (here.settings().masters_dir / name).is_dir()


def _only_one(home: Path) -> Any:
    """A lock for as long as `up` runs. Raises Conflict when a server or another `up` runs on this home."""
    import fcntl

    running = live_server(home)
    if running is not None:
        raise Conflict(f"a server (process {running['pid']}) already runs on {home}: {running['url']}")
    (home / SERVER_FILE).unlink(missing_ok=True)
    lock = (home / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise Conflict(f"another `noria up` runs on {home}") from None
    return lock


def _become(here: Place, module: str, arguments: list[str]) -> NoReturn:
    """Replaces this process by `python -m MODULE`: signals and the exit status are then its own."""
    here.settings()  # a wrong setting is said here, in one line
    sys.stdout.flush()
    os.execve(sys.executable, python_m(module, arguments), _environment(here))  # noqa: S606 - ours


def python_m(module: str, arguments: list[str]) -> list[str]:
    """Runs one of our modules. -P: a folder named `serve` or `train` where the user stands is not it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _environment(here: Place) -> dict[str, str]:
    settings = here.settings()
    return {**os.environ, "NORIA_HOME": str(settings.home)}


def _flags(**values: object) -> list[str]:
    """`http_port=1` as `["--http-port", "1"]`; what is None is left out."""
    given = _given(**values)
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def _given(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _master(folder: Path) -> dict[str, Any]:
    import json

    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        model_type = None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"name": folder.name, "path": str(folder), "model_type": model_type, "bytes": size}
