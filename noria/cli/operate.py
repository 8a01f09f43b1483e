"""`noria status` and `noria why`: what runs, and why training has or has not started.

Comes in: the wire's status, jobs and rollouts. Goes out: lines for people, or JSON.
Must not import the store: these commands ask the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from noria.cli.context import AsJson, place, print_fields, print_json, short, when
from noria.methods.table import reads_of, started_by
from noria.records import Json

app = typer.Typer()

Told = Mapping[str, Any]  # one of the wire's objects, to be read
IN_USE = ("used", "held_out")


@app.command(epilog="Example: noria status --json")
def status(ctx: typer.Context, as_json: AsJson = False) -> None:
    """What is live, what was judged, and what the trainer does."""
    with place(ctx).client() as client:
        told = client.status()
    if as_json:
        print_json(told)
        return
    fields: dict[str, object] = {
        "live": told["live"],
        "serving": told["serving"],
        "previous": told["previous"],
        **_judgements(told),
        "trainer": _trainer(told["trainer"], told["job"]),
        "job": _job(told["job"]),
    }
    if "capture" in told:
        fields["captured"] = f"{told.get('completions', 0)} completions, {told['capture'].get('dropped', 0)} dropped"
    print_fields(fields)


@app.command(epilog="Example: noria why")
def why(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Why training has or has not started, what the last snapshot left out, what the last rollout did."""
    with place(ctx).client() as client:
        told, jobs, rollouts = client.status(), client.jobs(limit=1), client.rollouts(limit=1)
        job, made = (jobs[0] if jobs else None), None
        if job and job["version"]:
            made = client.version(job["version"])
    reasons = explain(told, job, made, rollouts[0] if rollouts else None)
    if as_json:
        print_json(reasons)
    else:
        print_fields({name: part["text"] for name, part in reasons.items()})


def explain(told: Told, job: Told | None, made: Told | None, rollout: Told | None) -> dict[str, Json]:
    """The reasons, each with a `text` for people and the figures it was made of; `made` is the job's version."""
    trainer, running = told["trainer"], told["job"]
    if running:
        training = f"runs: {_job(running)}, asked for by {running.get('reason', 'an operator')}"
    elif not trainer["alive"]:
        training = "has not started: no trainer runs; start one with `noria up` or `noria train`"
    else:
        reason = trainer.get("idle_reason") or "the trainer looks for work"
        training = f"has not started: {reason.removeprefix('idle: ')}"
    parts: dict[str, Json] = {
        "training": {"text": training, "alive": trainer["alive"], "idle_reason": trainer.get("idle_reason")},
        **{name: {"text": text, **told[name]} for name, text in _judgements(told).items()},
    }
    if job is not None:
        snapshot = snapshot_counts(job, made)
        parts["last job"] = {"text": _ended(job), "id": job["id"], "state": job["state"], "error": job.get("error")}
        parts["its snapshot"] = {"text": _snapshot(snapshot, job), "counts": snapshot}
    if rollout is not None:
        parts["last rollout"] = {"text": _rollout(rollout), "rollout": rollout}
    return parts


def snapshot_counts(job: Told, made: Told | None) -> dict[str, int]:
    """What the job's snapshot used and left out, as the job says or the version that it made.

    Judgements by what became of them; prompts by their source; a recipe's rows and prompts by stage.
    """
    counts = (job.get("metrics") or {}).get("snapshot") or ((made or {}).get("metrics") or {}).get("counts") or {}
    return {key: int(value) for key, value in counts.items() if key != "total"}


def _snapshot(counts: dict[str, int], job: Told) -> str:
    if not counts:
        return "not taken yet" if job["state"] in ("queued", "running") else "none was taken"
    reads = reads_of(job["method"])
    if reads in (None, "prompts"):  # counted by source (`0:captured`), or by a recipe's stage
        told = ", ".join(f"{count} of {name.partition(':')[2] or name}" for name, count in counts.items())
        return f"{reads or 'rows'}: {told}"
    used = ", ".join(f"{count} {name}" for name, count in counts.items() if name in IN_USE)
    left = ", ".join(f"{count} {name}" for name, count in counts.items() if name not in IN_USE and count)
    return f"{used or 'nothing used'}; left out: {left or 'none'}"


def _judgements(told: Told) -> dict[str, str]:
    """Preferences and thumbs in words, and which of them start an automatic job of its method."""
    starting = started_by(told.get("method", "dpo"))
    found = {name: told[name] for name in ("preferences", "thumbs") if name in told}
    return {
        name: f"{counts['unused']} unused of {counts['total']}"
        + (f"; {counts['needed']} unused start a job" if name == starting else "")
        for name, counts in found.items()
    }


def _trainer(trainer: Told, job: Told | None) -> str:
    if not trainer["alive"]:
        return "not running"
    if job:
        return "works"
    reason = trainer.get("idle_reason") or "looks for work"
    return f"idle: {reason.removeprefix('idle: ')}"


def _job(job: Told | None) -> str | None:
    if job is None:
        return None
    return f"{job['id']} {job['state']}, stage {job['stage']}, {100 * job['progress']:.0f} %"


def _ended(job: Told) -> str:
    text = f"{job['id']} {job['state']}"
    if job.get("version"):
        text += f", made {job['version']}"
    error: Any = job.get("error")
    if error:
        text += f" at stage {job['stage']}: {error.get('message', error) if isinstance(error, dict) else error}"
    return text


def _rollout(rollout: Told) -> str:
    text = f"{rollout['version']} {rollout['state']}"
    if rollout.get("finished_at"):
        text += f" at {when(rollout['finished_at'])}"
    if rollout.get("reason"):
        return f"{text}: {rollout['reason']}"
    measured = short(rollout.get("metrics") or {}, ("validate_s", "drain_s", "pause_s", "reload_s"))
    return f"{text} ({measured})" if measured else text
