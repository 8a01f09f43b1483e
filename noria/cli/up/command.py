"""The command `noria up`: takes in a model where there is none, then keeps server and trainer running.

Comes in: flags. Goes out: two child processes, one line when the server answers, and nothing left behind at the end.
Must not import serve or train.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import SERVER_FILE, AsJson, Place, live_server, place, say
from noria.cli.models import fetched, name_of
from noria.cli.run import GrpcPort, Host, HttpPort, Insecure, environment_of, flags_of, python_m
from noria.errors import Conflict, NoriaError, TrainingError

if TYPE_CHECKING:
    from noria.cli.up.supervisor import Child, Stop
    from noria.settings import Settings

app = typer.Typer()

VERSION = re.compile(r"v[0-9]+")
EMBEDDED = "embedded"
BLANK = "embedded-blank"  # what the embedded model's eyes are trained from: nothing to serve by itself
STOP_S = 40.0  # beside the server's own wait: its engine ends, the trainer hands its job back
BUILD_STOP_S = 30.0
MODEL = "A version (v2), or a checkpoint, taken in the first time: a folder or a hub id. Default: live, or embedded."


@dataclass(frozen=True)
class Plan:
    """What `python -m train` does first (None: nothing), and what the server is told to serve (None: what is live)."""

    first: list[str] | None
    serve: str | None


@app.command(epilog="Example: noria up --model /models/llava-1.5-7b-hf --http-port 8080")
def up(
    ctx: typer.Context,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Runs the server and the trainer; with no model named, builds the embedded one the first time."""
    from noria.cli.up.supervisor import Stop

    here = place(ctx)
    given = {"host": host, "http_port": http_port, "grpc_port": grpc_port, "insecure": insecure or None}
    settings = here.settings(server={key: value for key, value in given.items() if value is not None} or None)
    settings.home.mkdir(parents=True, exist_ok=True)
    with only_one(settings.home):
        stop = Stop()
        stop.listen()
        require_keys(settings)
        planned = plan(settings, model)
        if planned.first is None or take_in(here, planned.first, stop):
            raise typer.Exit(keep_up(here, settings, planned.serve, stop, as_json))


def plan(settings: Settings, model: str | None) -> Plan:
    """Nothing is taken in twice: `up --model PATH` may be said at every start, and a rollout since then holds."""
    live, bases = models_of(settings)
    if model is None:
        return Plan(None if live or bases - {BLANK} else ["model", EMBEDDED], None)
    if VERSION.fullmatch(model):
        require_version(settings, model)
        return Plan(None, model)
    name = name_of(model)
    if name in bases:
        return Plan(None, None if name == live else name)
    if model == EMBEDDED:
        return Plan(["model", EMBEDDED], EMBEDDED)
    return Plan(["model", "add", str(fetched(model)), "--name", name], name)


def models_of(settings: Settings) -> tuple[str | None, set[str]]:
    """The name of the model that is live, and of all that a version can be served of."""
    from noria.registry import Registry
    from noria.store import Store

    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        registry.reconcile()
        names: dict[str, str] = {}
        for version in registry.list_versions():
            if version.state == "rejected":
                continue
            try:
                base = registry.manifest(version.id).base
            except NoriaError:
                continue  # a folder that cannot be read serves nobody; the server says so when it is named
            names[version.id] = base.name if base is not None else version.id
        return names.get(registry.live() or ""), set(names.values())


def require_version(settings: Settings, version: str) -> None:
    """Raises NotFound, before anything is started, for a version that does not exist."""
    from noria.store import Store

    with Store.open(settings.store_url) as store:
        store.get_version(version)


def require_keys(settings: Settings) -> None:
    """Raises SettingsError, before anything is built, where the server would listen to others without any key."""
    from noria.access.loopback import require_keys_beyond_loopback
    from noria.store import Store

    with Store.open(settings.store_url) as store:
        require_keys_beyond_loopback(settings.server, store.has_keys())


def take_in(here: Place, arguments: list[str], stop: Stop) -> bool:
    """Runs `python -m train model ...`; False when we were asked to stop meanwhile. Raises TrainingError."""
    from noria.cli.up.supervisor import Child, run_once

    what = "the embedded model is built" if arguments[1] == EMBEDDED else f"{arguments[2]} is taken in"
    say(f"{what}; this is done once")
    status = run_once(Child("builder", python_m("train", arguments), environment_of(here)), stop, stop_s=BUILD_STOP_S)
    if status and not stop.asked:
        raise TrainingError(f"the model was not built (status {status}); why is said above")
    return not stop.asked


def keep_up(here: Place, settings: Settings, model: str | None, stop: Stop, as_json: bool) -> int:
    """Runs server and trainer until we are asked to stop; returns the exit status."""
    from noria.cli.up.supervisor import Child, Supervisor

    given = settings.server
    flags = flags_of(host=given.host, http_port=given.http_port, grpc_port=given.grpc_port, model=model)
    if given.insecure:
        flags.append("--insecure")
    environment = with_trainer_key(environment_of(here))
    server = Child("server", python_m("serve", flags), environment)
    trainer = Child("trainer", python_m("train", []), environment)
    announcer = Announcer(server, settings.home, as_json)
    stop_s = given.shutdown_s + STOP_S
    return Supervisor([server, trainer], stop, stop_s=stop_s, tell=say, watch=announcer.look).run()


def with_trainer_key(environment: Mapping[str, str]) -> dict[str, str]:
    """The children's environment with a key for the trainer, drawn anew at each start and written nowhere.

    A server that asks for keys would refuse its own trainer else; where the operator gives the trainer a key
    (NORIA_API_KEY, server.api_key), that one is shown.
    """
    return {**environment, "NORIA_SERVER__TRAINER_KEY": secrets.token_hex(32)}


class Announcer:
    """Says once where the server is. A restarted server takes the same ports, and serves what is live by then."""

    def __init__(self, server: Child, home: Path, as_json: bool) -> None:
        self._server = server
        self._home = home
        self._as_json = as_json
        self._told = False

    def look(self) -> None:
        """Cheap; called often."""
        if self._told or self._server.process is None or not self._server.running:
            return
        ready = live_server(self._home)
        if ready is None or ready["pid"] != self._server.process.pid:
            return
        self._told = True
        self._settle(ready)
        where = f"{ready['url']}/v1 (OpenAI), {ready['url']}/noria/v1, gRPC {ready['grpc']}"
        typer.echo(json.dumps(ready) if self._as_json else f"noria is up: {where}, version {ready['version']}")
        sys.stdout.flush()

    def _settle(self, ready: dict[str, Any]) -> None:
        command = self._server.command
        for flag, told in (("--http-port", ready["url"]), ("--grpc-port", ready["grpc"])):
            command[command.index(flag) + 1] = str(told).rpartition(":")[2]
        if "--model" in command:
            at = command.index("--model")
            del command[at : at + 2]


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Holds the home for one `up`. Raises Conflict when a server or another `up` runs on it."""
    import fcntl

    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"another `noria up` already runs on {home}") from None
        running = live_server(home)
        if running is not None:
            raise Conflict(f"a server (process {running['pid']}) already runs on {home}: {running['url']}")
        (home / SERVER_FILE).unlink(missing_ok=True)
        yield
