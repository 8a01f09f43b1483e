"""The trainer daemon: waits for the policy or an operator, runs one job at a time, stops in order.

Comes in: settings. Goes out: jobs that end, heartbeats, and why it is idle, in plain words.
torch and what imports it are loaded when a job is claimed, not before: a waiting trainer is small.
Must not import `serve`.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

from noria.blobs import Blobs
from noria.errors import NoriaError, SettingsError
from noria.methods.table import started_by
from noria.recipes import Recipe, parse_recipe
from noria.records import Job, Json
from noria.registry import Registry
from noria.settings import Settings, TrainSettings, override_train
from noria.store import Store
from train.data.snapshot import select, select_thumbs
from train.heartbeat import Heartbeat
from train.log import EventLog
from train.pipeline.context import JobContext
from train.policy import Decision, Facts, check_window, decide

AUTOMATIC = ("min_preferences", "window")
POLICY_EVERY_S = 2.0
RunJob = Callable[["Trainer", Job], str]


class Trainer:
    """One trainer process over one store and registry. `run` returns when `stopping` is set."""

    def __init__(
        self, settings: Settings, store: Store, stopping: threading.Event, log: EventLog, run_job: RunJob | None = None
    ) -> None:
        check_window(settings.train.policy.window)
        self.settings = settings
        self.store = store
        self.registry = Registry(settings.models_dir, store)
        self.blobs = Blobs(settings.blobs_url)
        self.owner = f"trainer-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.stopping = stopping
        self.log = log
        self.heartbeat = Heartbeat(store, self.owner, settings.train.lease_s, stopping, log)
        self._run_job = run_job or run_claimed
        self._made: tuple[int, int, bool] | None = None

    def run(self) -> None:
        """Works until told to stop."""
        self.registry.reconcile()
        self.heartbeat.start()
        self.log.event("trainer_ready", owner=self.owner, home=str(self.settings.home))
        failures = 0
        try:
            while not self.stopping.is_set():
                try:
                    busy = self.step()
                    failures = 0
                except NoriaError as error:  # the store does not answer: try again, more and more slowly
                    failures += 1
                    busy = False
                    self.log.event("store_failed", error=error.message, failures=failures)
                if not busy:
                    self.stopping.wait(self.settings.train.poll_s * min(30, 2**failures))
        finally:
            self.heartbeat.stop()
            self.log.event("trainer_stopped", owner=self.owner)

    def step(self) -> bool:
        """Runs the next job to its end, or asks the policy. True when there may be more to do at once."""
        job = self.store.claim_job(self.owner, self.settings.train.lease_s)
        if job is not None:
            self.work(job)
            return True
        decision = self.consider()
        self.heartbeat.idle(decision.idle_reason)
        if not decision.start:
            return False
        policy = self.settings.train.policy
        made = self.store.create_job(policy.method, {}, policy.rollout, decision.reason or "min_preferences")
        self.log.event("job_created", job_id=made.id, reason=made.reason)
        return True

    def consider(self) -> Decision:
        """The policy over the store's facts. Pairs are counted only when everything else says go."""
        facts = self._facts()
        decision = decide(self.settings.train, facts)
        if not decision.start:
            return decision
        pairs, one_sided = self._made_of(facts.unused)
        return decide(self.settings.train, replace(facts, pairs=pairs, one_sided=one_sided))

    def _facts(self) -> Facts:
        running = self.store.list_jobs(1, state="running") or self.store.list_jobs(1, state="queued")
        automatic = [job.created_at for job in self.store.list_jobs(200) if job.reason in AUTOMATIC]
        return Facts(
            now=time.time(),
            unused=(self.store.thumb_counts() if self._counts_thumbs else self.store.preference_counts())["unused"],
            live=self.registry.live(),
            busy=running[0].id if running else None,
            last_automatic_at=max(automatic, default=None),
        )

    def _made_of(self, unused: int) -> tuple[int, bool]:
        """Training rows that the unused judgements make, and whether all have the same thumb.

        Counted again only when the judgements' number changes.
        """
        if self._made is None or self._made[0] != unused:
            held_out, one_sided = self.settings.train.held_out, False
            if self._counts_thumbs:
                thumbs = select_thumbs(self.store.training_thumbs(exclude_used=True), held_out=held_out).train
                count, one_sided = len(thumbs), len({thumb.up for thumb in thumbs}) < 2
            else:
                count = len(select(self.store.training_pairs(exclude_used=True), held_out=held_out).train)
            self._made = (unused, count, one_sided)
        return self._made[1:]

    @property
    def _counts_thumbs(self) -> bool:
        return started_by(self.settings.train.policy.method) == "thumbs"

    def work(self, job: Job) -> str:
        """Runs a job that this trainer owns to its end, and returns how it went."""
        self.heartbeat.work(job.id)
        self.log.event("job_claimed", job_id=job.id, attempt=job.attempt, reason=job.reason, done=list(job.done))
        started = time.monotonic()
        outcome = "interrupted"
        try:
            outcome = self._run_job(self, job)
        finally:
            self.log.end_progress()
            self.heartbeat.idle(f"idle: job {job.id} {outcome}")
            self.log.event("job_ended", job_id=job.id, outcome=outcome, seconds=round(time.monotonic() - started, 1))
        return outcome


def run_claimed(trainer: Trainer, job: Job) -> str:
    """The pipeline over one claimed job; imports torch at the first."""
    from train.pipeline.runner import run_job

    try:
        ctx = job_context(trainer, job)
    except SettingsError as error:
        wrong = {"code": error.code, "message": error.message}
        trainer.store.finish_job(job.id, trainer.owner, "failed", error=wrong)
        return "failed"
    return run_job(ctx)


def job_context(trainer: Trainer, job: Job) -> JobContext:
    """What the stages of a trainer's job are handed. Raises SettingsError, as `job_settings`."""
    recipe, train = job_settings(trainer.settings.train, job.settings)
    return JobContext(
        store=trainer.store,
        registry=trainer.registry,
        blobs=trainer.blobs,
        settings=trainer.settings,
        train=train,
        job=job,
        owner=trainer.owner,
        check=trainer.heartbeat.check,
        log=trainer.log,
        recipe=recipe,
    )


def job_settings(train: TrainSettings, settings: Json) -> tuple[Recipe | None, TrainSettings]:
    """A job's recipe, if it has one, and its training settings: ours, then the recipe's, then the job's own.

    Raises SettingsError naming the key.
    """
    own = {key: value for key, value in settings.items() if key != "recipe"}
    if "recipe" not in settings:
        return None, override_train(train, own)
    recipe = parse_recipe(settings["recipe"], where="settings.recipe")
    wanted = override_train(train, {"quantize": recipe.quantize, "verify": recipe.verify})
    return recipe, override_train(wanted, own)


def run_daemon(settings: Settings) -> int:
    """Opens the store, runs until SIGTERM or SIGINT; a second signal ends the process at once."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log = EventLog()
    with Store.open(settings.store_url) as store:
        Trainer(settings, store, stopping, log).run()
    return 0
