"""What an operator asks for: jobs, versions, rollouts, status.

Comes in: request bodies as dicts, from either wire. Goes out: wire dicts, or a NoriaError that says why not.
Nothing is trained or swapped here: jobs and rollouts are rows that the trainer and the releaser take up.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from noria.errors import Conflict, InvalidRequest
from noria.methods.grpo import require_trainable
from noria.methods.table import METHODS, Reads, reads_of, refuse_foreign
from noria.records import Job, Json
from noria.registry import Registry
from noria.settings import PolicySettings, Settings, TrainSettings, override_train
from noria.store import Store
from serve.api.ports import Capture, Gate
from serve.api.schemas import JobBody, JobPage, Page, RolloutBody, cut, parse

AFTER_JOB: tuple[str, ...] = typing.get_args(PolicySettings.model_fields["rollout"].annotation)
STRATEGIES = ("direct",)
DAEMON_KEYS = ("policy", "lease_s", "poll_s")  # the daemon reads them before any job: an override would do nothing
ENDED = ("succeeded", "failed", "cancelled")
WATCH_POLL_S = 0.25
TRAINER_FRESH_S = 15.0
WHOLE = 10_000  # jobs and rollouts are few: their lists are read whole and cut


class Operations:
    """Handlers of jobs, versions, rollouts and status."""

    def __init__(self, store: Store, registry: Registry, gate: Gate, capture: Capture, settings: Settings) -> None:
        self._store = store
        self._registry = registry
        self._gate = gate
        self._capture = capture
        self._settings = settings

    async def create_job(self, body: Mapping[str, Any]) -> Json:
        """Queues a job. Raises InvalidRequest, SettingsError (both name the field), Conflict (too few judgements).

        A job of method `grpo` needs a reward, not judgements.
        """
        asked = parse(JobBody, body)
        policy = self._settings.train.policy
        method = one_of("method", asked.method or policy.method, tuple(METHODS))
        rollout = one_of("rollout", asked.rollout or policy.rollout, AFTER_JOB)
        for key in DAEMON_KEYS:
            if key in asked.settings:
                raise InvalidRequest(
                    f"settings.{key}: belongs to the trainer daemon, not to one job; set train.{key} in noria.toml",
                    param=f"settings.{key}",
                )
        refuse_foreign(method, asked.settings)
        train = override_train(self._settings.train, asked.settings)
        if METHODS[method].reads == "prompts":
            require_trainable(train.policies(), train.reward)
        else:
            await self._enough(method, train)
        job = await asyncio.to_thread(self._store.create_job, method, asked.settings, rollout, "operator")
        return job.to_wire()

    async def list_jobs(self, query: Mapping[str, Any]) -> Json:
        """A page of jobs, newest first."""
        page = parse(JobPage, query)
        rows = await asyncio.to_thread(self._store.list_jobs, WHOLE, state=page.state)
        return cut([row.to_wire() for row in rows], page)

    async def get_job(self, job_id: str) -> Json:
        """One job. Raises NotFound."""
        return (await asyncio.to_thread(self._store.get_job, job_id)).to_wire()

    async def cancel_job(self, job_id: str) -> Json:
        """Asks a job to stop: a queued one is cancelled at once, a running one at its next heartbeat.

        Asking again is no error. Raises NotFound, Conflict when the job has already succeeded or failed.
        """
        job = await asyncio.to_thread(self._store.get_job, job_id)
        if job.state in ("succeeded", "failed"):
            raise Conflict(f"job {job_id} has already {job.state}; there is nothing to cancel", param="job_id")
        if job.state != "cancelled":
            await asyncio.to_thread(self._store.request_cancel, job_id)
        return await self.get_job(job_id)

    async def watch_job(self, job_id: str, after: int = 0) -> AsyncGenerator[Json, None]:
        """The job's events with `seq` above `after`, as they come, until it has ended. Raises NotFound at once."""
        await asyncio.to_thread(self._store.get_job, job_id)
        return self._events(job_id, after)

    async def _events(self, job_id: str, after: int) -> AsyncGenerator[Json, None]:
        while True:
            job: Job = await asyncio.to_thread(self._store.get_job, job_id)  # before its events: none is then missed
            for event in await asyncio.to_thread(self._store.events, job_id, after):
                after = event.seq
                yield event.to_wire()
            if job.state in ENDED:
                return
            await asyncio.sleep(WATCH_POLL_S)

    async def list_versions(self, query: Mapping[str, Any]) -> Json:
        """A page of versions, newest first."""
        page = parse(Page, query)
        rows = await asyncio.to_thread(self._store.list_versions)
        return cut([row.to_wire() for row in reversed(rows)], page)

    async def get_version(self, version_id: str) -> Json:
        """One version, with what its manifest says beside the table's row, and how many users whose data it learnt
        from were forgotten since. Raises NotFound.
        """
        version = await asyncio.to_thread(self._store.get_version, version_id)
        manifest = await asyncio.to_thread(self._registry.manifest, version_id)
        forgotten = await asyncio.to_thread(self._store.forgotten_of, version_id)
        return {**version.to_wire(), "manifest": manifest.model_dump(mode="json"), "forgotten": forgotten}

    async def create_rollout(self, body: Mapping[str, Any]) -> Json:
        """Asks for a version to go live. Raises NotFound, Conflict (live already, rejected, another one runs)."""
        asked = parse(RolloutBody, body)
        one_of("strategy", asked.strategy, STRATEGIES)
        if asked.percent is not None:
            raise InvalidRequest("percent: belongs to strategy 'canary'; 'direct' takes all traffic", param="percent")
        return await self._roll(asked.version)

    async def rollback(self) -> Json:
        """Asks for the version that was live before. Raises Conflict when there is none."""
        previous = await asyncio.to_thread(self._store.previous)
        if previous is None:
            live = await asyncio.to_thread(self._store.live)
            raise Conflict(
                f"there is no previous version to go back to: {live or 'none'} is the only one that was ever live",
                code="no_previous_version",
            )
        return await self._roll(previous)

    async def get_rollout(self, rollout_id: str) -> Json:
        """One rollout. Raises NotFound."""
        return (await asyncio.to_thread(self._store.get_rollout, rollout_id)).to_wire()

    async def list_rollouts(self, query: Mapping[str, Any]) -> Json:
        """A page of rollouts, newest first."""
        page = parse(Page, query)
        rows = await asyncio.to_thread(self._store.list_rollouts, WHOLE)
        return cut([row.to_wire() for row in rows], page)

    async def status(self) -> Json:
        """What is live, what was captured and judged, and why training has or has not started."""
        return await asyncio.to_thread(self._status)

    def _status(self) -> Json:
        store, policy = self._store, self._settings.train.policy
        trainers = store.processes("trainer", fresh_s=TRAINER_FRESH_S)
        newest = max(trainers, key=lambda one: one.heartbeat_at, default=None)
        jobs = store.list_jobs(1, state="running") or store.list_jobs(1, state="queued")
        rollouts = [one for one in store.list_rollouts() if one.state in ("queued", "running")]
        return {
            "object": "status",
            "live": store.live(),
            "serving": self._gate.current.id,
            "previous": store.previous(),
            "fingerprint": self._gate.current.fingerprint,
            "in_flight": self._gate.in_flight,
            "preferences": {**store.preference_counts(), "needed": policy.min_preferences},
            "thumbs": {**store.thumb_counts(), "needed": policy.min_preferences},
            "method": policy.method,
            "trainer": {"alive": newest is not None, "idle_reason": idle_reason(newest.info if newest else None)},
            "job": jobs[0].to_wire() if jobs else None,
            "rollout": rollouts[0].to_wire() if rollouts else None,
            "completions": store.count_completions(),
            "capture": {
                "sent": self._capture.sent,
                "stored": self._capture.stored,
                "dropped": self._capture.dropped,
            },
        }

    async def _roll(self, version_id: str) -> Json:
        live = await asyncio.to_thread(self._store.live)
        if version_id == live and self._gate.current.id == live:
            raise Conflict(f"{version_id} is live already", param="version", code="already_live")
        rollout = await asyncio.to_thread(self._store.create_rollout, version_id, "direct")
        return rollout.to_wire()

    async def _enough(self, method: str, train: TrainSettings) -> None:
        """Raises Conflict where what the method reads is too little, or a job before it will take that."""
        unused, reads = train.preferences == "unused", METHODS[method].reads
        if reads == "thumbs":
            count = len(await asyncio.to_thread(self._store.training_thumbs, exclude_used=unused))
            kind, code = "answers with a thumb", "too_few_thumbs"
        else:
            judged = await asyncio.to_thread(self._store.training_pairs, exclude_used=unused)
            count, kind, code = sum(pair is not None for _, pair in judged), "training pairs", "too_few_preferences"
        if count < train.min_pairs:
            more = ', or train on every one again (settings.preferences="all")' if unused else ""
            raise Conflict(
                f"{count} {'unused ' if unused else ''}{kind} are stored and a job needs at least {train.min_pairs} "
                f"(train.min_pairs): record more {reads}, or lower settings.min_pairs for this job{more}",
                param="settings.min_pairs",
                code=code,
            )
        if unused:
            await asyncio.to_thread(self._nobody_takes_them, reads)

    def _nobody_takes_them(self, reads: Reads) -> None:
        waiting = [*self._store.list_jobs(WHOLE, state="queued"), *self._store.list_jobs(1, state="running")]
        for job in waiting:
            if "snapshot" not in job.done and reads_of(job.method) == reads:
                raise Conflict(
                    f"job {job.id} is {job.state} and has not taken its snapshot yet: it will take the unused "
                    f"{reads}; wait until it has, or cancel it",
                    param="settings.preferences",
                    code="preferences_taken",
                )


def one_of(field: str, value: str, supported: tuple[str, ...]) -> str:
    """The value. Raises InvalidRequest naming the field and what is supported now."""
    if value not in supported:
        names = ", ".join(supported)
        raise InvalidRequest(f"{field}: {value!r} is not supported; supported now: {names}", param=field)
    return value


def idle_reason(info: Json | None) -> str | None:
    """Why no job runs, in the trainer's own words; None while one runs."""
    if info is None:
        return "no trainer is running: start one with `noria train` or `noria up`"
    reason = info.get("idle_reason")
    return None if reason is None else str(reason)
