"""`noria retrain` and `noria jobs`: training, asked for and followed.

Comes in: method, settings, job ids. Goes out: jobs and their events; a waited-for job's end is the exit status.
Jobs are listed, shown and cancelled in the store where the home has no server: `noria train run` needs none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import AsJson, place, print_fields, print_json, print_table, say, shown, when
from noria.errors import Conflict, InvalidRequest, TrainingError

if TYPE_CHECKING:
    from noria.client import NoriaClient
    from noria.client.shapes import Job
    from noria.records import Json
    from noria.store import Store

app = typer.Typer()
group = typer.Typer(invoke_without_command=True, epilog="Example: noria jobs --json")
JobId = Annotated[str, typer.Argument(metavar="JOB", help="job_...")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]


@app.command(epilog="Example: noria retrain --wait --settings dpo.beta=0.2 --settings dpo.epochs=2")
def retrain(
    ctx: typer.Context,
    method: Annotated[
        str | None,
        typer.Option(
            help="dpo, simpo, orpo, cpo, kto, mpo (docs/methods.md) or grpo (docs/grpo.md). "
            "Default: train.policy.method."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting under `train`, for this job only.")
    ] = None,
    rollout: Annotated[str | None, typer.Option(help="none or direct. Default: train.policy.rollout.")] = None,
    as_json: AsJson = False,
) -> None:
    """Trains a new version from the preferences (kto: from the thumbs; grpo: from rewarded samples), now."""
    with place(ctx).client() as client:
        job = client.create_job(method=method, settings=nested(settings or []), rollout=rollout)
        if wait:
            job = _wait(client, job)
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['id']} {job['state']}" + (f", made {job['version']}" if job.get("version") else ""))
    if wait:
        raise_ended(job)


@group.callback()
def jobs(ctx: typer.Context, limit: Limit = 20, as_json: AsJson = False) -> None:
    """Training jobs; without a subcommand, a list of the newest."""
    if ctx.invoked_subcommand is None:
        _list(ctx, limit, as_json)


@group.command("list", epilog="Example: noria jobs list --limit 5")
def list_jobs(ctx: typer.Context, limit: Limit = 20, as_json: AsJson = False) -> None:
    """The newest jobs, newest first."""
    _list(ctx, limit, as_json)


@group.command(epilog="Example: noria jobs show job_0123456789abcdef01234567")
def show(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """One job: state, stage, measures, error."""
    found = place(ctx).ask(lambda client: client.job(job), lambda store: store.get_job(job).to_wire())
    if as_json:
        print_json(found)
        return
    keys = ("id", "method", "state", "stage", "version", "rollout", "reason", "attempt")
    times = {key.removesuffix("_at"): when(found.get(key)) for key in ("created_at", "started_at", "finished_at")}
    measured = {f"measured {name}": value for name, value in (found.get("metrics") or {}).items()}
    progress = f"{100 * found['progress']:.0f} %"
    print_fields({**{k: found.get(k) for k in keys}, "progress": progress, **times, "error": _error(found), **measured})


@group.command(epilog="Example: noria jobs cancel job_0123456789abcdef01234567")
def cancel(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """Asks a job to stop; a running one stops at its next heartbeat, one whose trainer is dead at once."""
    found = place(ctx).ask(lambda client: client.cancel_job(job), lambda store: _cancel_in(store, job))
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['id']} {found['state']}" + ("" if found["state"] == "cancelled" else ", asked to stop"))


@group.command(epilog="Example: noria jobs watch job_0123456789abcdef01234567")
def watch(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """A job's events as they come, until its end; with --json one JSON document a line. Fails when the job failed."""
    with place(ctx).client() as client:
        for event in client.watch_job(job):
            if as_json:
                typer.echo(json.dumps(event))
            else:
                said = " ".join(f"{key}={value}" for key, value in event["data"].items())
                typer.echo(f"{when(event['at'])}  {event['kind'].ljust(8)}  {shown(said)}")
        raise_ended(client.job(job))


def _cancel_in(store: Store, job: str) -> Json:
    from noria.access.audit import by_os_user

    with by_os_user(store, "cancel_job", job):
        return store.request_cancel(job).to_wire()


def nested(pairs: list[str]) -> dict[str, Any]:
    """`["dpo.beta=0.2"]` as `{"dpo": {"beta": 0.2}}`; a value is JSON where it reads as JSON, else text.

    Raises InvalidRequest naming a pair that is not KEY=VALUE.
    """
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise InvalidRequest(f"--settings {pair!r} is not KEY=VALUE, like dpo.beta=0.2", param="settings")
        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
            if not isinstance(branch, dict):
                raise InvalidRequest(f"--settings {key}: {name} was already given a value", param="settings")
        try:
            branch[names[-1]] = json.loads(text)
        except ValueError:
            branch[names[-1]] = text
    return tree


def raise_ended(job: Mapping[str, Any]) -> None:
    """Nothing for a job that succeeded.

    Raises TrainingError for a failed one, Conflict for a cancelled one or one whose version could not go live.
    """
    if job["state"] == "failed":
        raise TrainingError(f"job {job['id']} failed at stage {job['stage']}: {_error(job) or 'no reason was kept'}")
    if job["state"] == "cancelled":
        raise Conflict(f"job {job['id']} was cancelled at stage {job['stage']}")
    rollout = (job.get("metrics") or {}).get("rollout") or {}
    if rollout.get("state") == "failed":
        raise Conflict(f"job {job['id']} made {job['version']}, but its rollout failed: {rollout.get('reason')}")


def _list(ctx: typer.Context, limit: int, as_json: bool) -> None:
    found = place(ctx).ask(
        lambda client: client.jobs(limit=limit), lambda store: [job.to_wire() for job in store.list_jobs(limit)]
    )
    if as_json:
        print_json(found)
        return
    print_table(
        ("job", "state", "stage", "progress", "method", "version", "created", "error"),
        [
            (
                *(one.get(key) for key in ("id", "state", "stage")),
                f"{100 * one['progress']:.0f} %",
                *(one.get(key) for key in ("method", "version")),
                when(one.get("created_at")),
                _error(one),
            )
            for one in found
        ],
    )


def _wait(client: NoriaClient, job: Job) -> Job:
    """Follows the job with a progress bar on standard error; returns it as it ended."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    say(f"job {job['id']}; Ctrl-C stops waiting, `noria jobs cancel` stops the job")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting for the trainer", total=1.0)
        for event in client.watch_job(job["id"]):
            data = event["data"]
            stage, loss = data.get("stage"), data.get("loss")
            if stage or loss is not None:
                words = [stage or progress.tasks[0].description.split()[0], "" if loss is None else f"loss {loss:.3f}"]
                progress.update(task, description=" ".join(word for word in words if word))
            if "progress" in data:
                progress.update(task, completed=float(data["progress"]))
        ended = client.job(job["id"])
        if ended["state"] == "succeeded":
            progress.update(task, completed=1.0)
    return ended


def _error(job: Mapping[str, Any]) -> str | None:
    error: Any = job.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else error
