"""`python -m train run RECIPE`: one recipe as a job of this very process, from its first stage to its version.

Comes in: settings, a recipe's file, flags. Goes out: an exit status; progress on stderr, the job on stdout.
The job is as any other: it can be watched and cancelled, and a daemon goes on with it if this process dies.
Must not import torch at the top.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from noria.access.audit import by_os_user
from noria.errors import Conflict, NoriaError, SettingsError, TrainingError, wire_of
from noria.recipes import load_recipe
from noria.records import Job, Json
from noria.settings import Settings
from noria.store import Store
from train.daemon import Trainer, job_settings
from train.log import EventLog

INTERRUPTED = 130
_LOOK_S = 0.5  # between two looks at a lease that is waited for


def main(settings: Settings, argv: Sequence[str]) -> int:
    """Runs a recipe, or goes on with the job that was left. 0 when it succeeded, 130 when it was interrupted."""
    asked = _arguments(argv)
    wanted = None if asked.recipe is None else _job(settings, asked)
    job, outcome = run_here(settings, wanted, asked.rollout)
    if asked.json:
        print(json.dumps(job.to_wire(), indent=2, ensure_ascii=False))
    elif outcome == "succeeded":
        print(f"{job.id} succeeded, made {job.version}")
    return told_end(job, outcome)


def run_here(settings: Settings, wanted: Json | None, rollout: str = "none") -> tuple[Job, str]:
    """Makes a job of method `recipe` with the settings `wanted`, or takes up the one that was left, and runs it.

    Returns the job and how it went. From here on the process stops in order at a first SIGTERM or SIGINT. Raises
    Conflict when another job is open, or none was left.
    """
    stopping = threading.Event()
    log = EventLog()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _Stopper(stopping))
    settings.home.mkdir(parents=True, exist_ok=True)
    with Store.open(settings.store_url) as store:
        trainer = Trainer(settings, store, stopping, log)
        trainer.registry.reconcile()
        job = _claim(trainer, wanted, rollout)
        trainer.heartbeat.work(job.id)
        trainer.heartbeat.start()
        try:
            with _quiet_stdout():
                outcome = trainer.work(job)
        finally:
            trainer.heartbeat.stop()
        return store.get_job(job.id), outcome


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noria train run")
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--rollout", choices=("none", "direct"), default="none")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(list(argv))
    if (asked.recipe is None) != asked.resume:
        raise SettingsError("name a recipe, or say --resume to go on with the job that was left", param="recipe")
    return asked


def _job(settings: Settings, asked: argparse.Namespace) -> Json:
    """The job's settings, checked before the job is there."""
    recipe = load_recipe(asked.recipe)
    own = {} if asked.processes is None else {"processes": asked.processes}
    wanted = {**own, "recipe": recipe.model_dump(mode="json", exclude_defaults=True)}
    job_settings(settings.train, wanted)
    return wanted


def _claim(trainer: Trainer, wanted: Json | None, rollout: str) -> Job:
    """A new job, or the one to go on with. Raises Conflict when another runs, or none was left."""
    if wanted is None:
        return _left(trainer)
    try:
        with by_os_user(trainer.store, "create_job") as noted:
            lease_s = trainer.settings.train.lease_s
            job = trainer.store.start_job("recipe", wanted, rollout, trainer.owner, lease_s)
            noted.target = job.id
            return job
    except Conflict as error:
        advice = "wait for it, go on with it (`noria train run --resume`) or end it (`noria jobs cancel`)"
        raise Conflict(f"{error.message}: {advice}", code=error.code) from error


def _left(trainer: Trainer) -> Job:
    """The job that was left. A trainer that was killed still holds its lease, which is waited for.

    Raises Conflict (code `no_job`, `job_runs`): none was left; its trainer lives, for it renews the lease.
    """
    waiting_for: float | None = None
    while True:
        job = trainer.store.claim_job(trainer.owner, trainer.settings.train.lease_s)
        if job is not None:
            return job
        running = trainer.store.list_jobs(1, state="running")
        if not running:
            raise Conflict("no job was left to go on with", code="no_job")
        until = running[0].lease_until or 0.0
        if waiting_for is None:
            left_s = math.ceil(max(0.0, until - time.time()))
            told = f"job {running[0].id} belongs to another trainer for {left_s} s more"
            sys.stderr.write(f"noria train: {told}; if that one is dead, it goes on here then\n")
            waiting_for = until
        if until > waiting_for:
            raise Conflict(f"job {running[0].id} is trained elsewhere: its trainer is alive", code="job_runs")
        if trainer.stopping.wait(_LOOK_S):
            raise Conflict(f"stopped while job {running[0].id} was waited for", code="job_runs")


def told_end(job: Job, outcome: str) -> int:
    """Says on standard error why a job did not succeed. 0 when it did, 130 when it was interrupted."""
    try:
        _raise_ended(job, outcome)
    except NoriaError as error:
        sys.stderr.write(f"noria train: {error.message}\n")
        return INTERRUPTED if outcome == "released" else wire_of(error).exit_code
    return 0


def _raise_ended(job: Job, outcome: str) -> None:
    """Nothing for a job that succeeded. Raises TrainingError for a failed one, Conflict for one that was stopped."""
    if outcome == "failed":
        raise TrainingError(f"job {job.id} failed at stage {job.stage}: {(job.error or {}).get('message')}")
    if outcome != "succeeded":
        more = {"released": "; `noria train run --resume` goes on with it", "lost": " by another trainer"}
        raise Conflict(f"job {job.id} was {outcome} at stage {job.stage}{more.get(outcome, '')}")


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Libraries greet on standard output (gptqmodel 7.6 does, from several processes); here it is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class _Stopper:
    """The first signal stops in order, a second one at once."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set():
            raise SystemExit(128 + number)
        self._stopping.set()
