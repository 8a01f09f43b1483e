"""Jobs: a queue that several trainers can ask, with leases, so that a dead trainer's job goes on elsewhere.

Comes in: requests for jobs, and what the trainer that owns one reports. Goes out: `Job` and `JobEvent` values.
Must not import torch, vllm or fastapi.

At most one job runs at a time. Its owner renews a lease; when the lease has run out, whoever claims next takes the
job over with `attempt` + 1 and everything in `done`. Each change and its event are one transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select, update

from noria.errors import Conflict, InvalidRequest, LeaseLost, NotFound
from noria.records import Job, JobEvent, JobState, Json, Stage
from noria.store.completions import Part
from noria.store.tables import job_events, jobs

ENDED = ("succeeded", "failed", "cancelled")


class JobStore(Part):
    """The store's jobs."""

    def create_job(
        self, method: str, settings: Json | None = None, rollout: str = "none", reason: str = "operator"
    ) -> Job:
        """Queues a job."""
        job = self._made(method, settings, rollout, reason)
        with self._db.write() as conn:
            _insert(conn, job)
        return job

    def start_job(
        self, method: str, settings: Json, rollout: str, owner: str, lease_s: float, reason: str = "operator"
    ) -> Job:
        """Makes a job that is the caller's at once, with a lease. Raises Conflict when another is queued or running."""
        job = self._made(method, settings, rollout, reason)
        with self._db.write() as conn:
            self._db.lock(conn, "jobs")
            query = (
                select(jobs).where(jobs.c.state.in_(("running", "queued"))).order_by(jobs.c.state.desc(), jobs.c.seq)
            )
            other = conn.execute(query).first()
            if other is not None:
                abandoned = other.state == "running" and (other.lease_until or 0.0) <= job.created_at
                told = "was left by its trainer" if abandoned else f"is {other.state}"
                raise Conflict(f"job {other.id} ({other.method}) {told}, and one job runs at a time", code="job_runs")
            _insert(conn, job)
            return _take(conn, job, owner, job.created_at, lease_s)

    def get_job(self, id_: str) -> Job:
        """One job. Raises NotFound."""
        with self._db.read() as conn:
            return _get(conn, id_)

    def list_jobs(self, limit: int = 20, state: JobState | None = None) -> list[Job]:
        """The newest jobs first."""
        query = select(jobs).order_by(jobs.c.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with self._db.read() as conn:
            return [_job(row) for row in conn.execute(query)]

    def claim_job(self, owner: str, lease_s: float) -> Job | None:
        """Gives the caller the job to run, or None: the running one if its lease is over, else the oldest queued.

        A job whose cancellation was asked for is never given out; if its trainer is dead it is cancelled here.
        """
        now = self._now()
        with self._db.write() as conn:
            self._db.lock(conn, "jobs")
            running = conn.execute(select(jobs).where(jobs.c.state == "running")).first()
            if running is not None:
                if running.lease_until is not None and running.lease_until > now:
                    return None
                if not running.cancel_requested:
                    return _take(conn, _job(running), owner, now, lease_s)
                _end(conn, running.id, now, "cancelled")
            waiting = select(jobs).where(jobs.c.state == "queued", jobs.c.cancel_requested.is_(False))
            row = conn.execute(waiting.order_by(jobs.c.seq).limit(1)).first()
            return None if row is None else _take(conn, _job(row), owner, now, lease_s)

    def heartbeat(self, job_id: str, owner: str, lease_s: float) -> Job:
        """Renews the lease. Raises LeaseLost if the job has another owner, has ended, or is to be cancelled."""
        now = self._now()
        with self._db.write() as conn:
            job = self._owned(conn, job_id, owner)
            if job.cancel_requested:
                raise LeaseLost(f"job {job_id} is to be cancelled", code="cancelled")
            _set(conn, job_id, lease_until=now + lease_s, heartbeat_at=now)
            return _get(conn, job_id)

    def set_progress(
        self,
        job_id: str,
        owner: str,
        *,
        stage: Stage | None = None,
        progress: float | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Reports where the job is; `metrics` are merged into those it has. Raises LeaseLost for another owner."""
        with self._db.write() as conn:
            job = self._owned(conn, job_id, owner)
            changes: Json = {}
            if stage is not None:
                changes["stage"] = stage
            if progress is not None:
                changes["progress"] = min(1.0, max(0.0, float(progress)))
            if metrics:
                changes["metrics"] = {**job.metrics, **metrics}
            if not changes:
                return
            _set(conn, job_id, **changes)
            kind = "progress" if progress is not None else "metrics"
            if stage not in (None, job.stage):
                kind = "stage"
            told = {"stage": stage or job.stage, "progress": changes.get("progress", job.progress)}
            _event(conn, job_id, self._now(), kind, {**told, **({"metrics": dict(metrics)} if metrics else {})})

    def finish_stage(self, job_id: str, owner: str, stage: Stage, handover: Json | None = None) -> None:
        """Notes that a stage is done, with what it hands on; a later attempt skips it. Raises LeaseLost."""
        with self._db.write() as conn:
            job = self._owned(conn, job_id, owner)
            _set(conn, job_id, done={**job.done, stage: dict(handover or {})})
            _event(conn, job_id, self._now(), "stage", {"stage": stage, "finished": True})

    def finish_job(
        self, job_id: str, owner: str, state: JobState, version: str | None = None, error: Json | None = None
    ) -> Job:
        """Ends the job as succeeded, failed or cancelled. Raises LeaseLost for another owner."""
        if state not in ENDED:
            raise InvalidRequest(f"a job cannot end as {state!r}", param="state")
        with self._db.write() as conn:
            self._owned(conn, job_id, owner)
            return _end(conn, job_id, self._now(), state, version, error)

    def request_cancel(self, job_id: str) -> Job:
        """Cancels: a queued job, or one whose trainer is dead, at once; a running one at its next heartbeat.

        Raises NotFound, and Conflict for a job that has succeeded or failed.
        """
        now = self._now()
        with self._db.write() as conn:
            self._db.lock(conn, "jobs")
            job = _get(conn, job_id, locked=True)
            if job.state == "cancelled":
                return job
            if job.state in ENDED:
                raise Conflict(f"job {job_id} has already {job.state}", param="job_id")
            alive = job.state == "running" and (job.lease_until or 0.0) > now
            if not alive:
                return _end(conn, job_id, now, "cancelled", cancel_requested=True)
            if not job.cancel_requested:
                _set(conn, job_id, cancel_requested=True)
                _event(conn, job_id, now, "state", {"state": "running", "cancel_requested": True})
            return _get(conn, job_id)

    def release_job(self, job_id: str, owner: str) -> None:
        """Ends the lease now, so that the next claim takes the job up at once. For a trainer that stops in order."""
        now = self._now()
        with self._db.write() as conn:
            self._owned(conn, job_id, owner)
            _set(conn, job_id, owner=None, lease_until=None)
            _event(conn, job_id, now, "state", {"state": "running", "released": True})

    def add_event(self, job_id: str, kind: str, data: Json) -> JobEvent:
        """Adds a line to the job's history. Raises NotFound."""
        with self._db.write() as conn:
            return _event(conn, job_id, self._now(), kind, data)

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """The job's history past `after`, in order. Raises NotFound."""
        query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after)
        with self._db.read() as conn:
            found = [JobEvent(**row._mapping) for row in conn.execute(query.order_by(job_events.c.seq))]
            if not found:
                _get(conn, job_id)
            return found

    def _made(self, method: str, settings: Json | None, rollout: str, reason: str) -> Job:
        return Job(
            id="job_" + secrets.token_hex(12),
            method=method,
            state="queued",
            stage="snapshot",
            progress=0.0,
            created_at=self._now(),
            settings=dict(settings or {}),
            rollout=rollout,
            reason=reason,
        )

    def _owned(self, conn: Connection, job_id: str, owner: str) -> Job:
        job = _get(conn, job_id, locked=True)
        if job.state != "running":
            raise LeaseLost(f"job {job_id} is {job.state}", code="cancelled" if job.state == "cancelled" else None)
        if job.owner != owner:
            raise LeaseLost(f"job {job_id} belongs to {job.owner or 'nobody'}, no longer to {owner}")
        return job


def _insert(conn: Connection, job: Job) -> None:
    conn.execute(insert(jobs), {**vars(job), "event_seq": 0})
    _event(conn, job.id, job.created_at, "state", {"state": "queued", "reason": job.reason})


def _get(conn: Connection, id_: str, locked: bool = False) -> Job:
    query = select(jobs).where(jobs.c.id == id_)
    row = conn.execute(query.with_for_update() if locked else query).first()
    if row is None:
        raise NotFound(f"no job {id_!r}", param="job_id")
    return _job(row)


def _take(conn: Connection, job: Job, owner: str, now: float, lease_s: float) -> Job:
    _set(
        conn,
        job.id,
        state="running",
        owner=owner,
        attempt=job.attempt + 1,
        lease_until=now + lease_s,
        heartbeat_at=now,
        started_at=now if job.started_at is None else job.started_at,
    )
    told = {"state": "running", "attempt": job.attempt + 1, "owner": owner, "done": list(job.done)}
    _event(conn, job.id, now, "state", told)
    return _get(conn, job.id)


def _end(
    conn: Connection,
    job_id: str,
    now: float,
    state: JobState,
    version: str | None = None,
    error: Json | None = None,
    **more: Any,
) -> Job:
    changes: Json = {"state": state, "finished_at": now, "owner": None, "lease_until": None, "error": error, **more}
    if version is not None:
        changes["version"] = version
    if state == "succeeded":
        changes["progress"] = 1.0
    _set(conn, job_id, **changes)
    _event(conn, job_id, now, "state", {"state": state, "version": version, "error": error})
    return _get(conn, job_id)


def _set(conn: Connection, job_id: str, **changes: Any) -> None:
    conn.execute(update(jobs).where(jobs.c.id == job_id).values(**changes))


def _event(conn: Connection, job_id: str, at: float, kind: str, data: Json) -> JobEvent:
    """Counting in the job's own row gives each event its number, and makes two writers queue."""
    counted = update(jobs).where(jobs.c.id == job_id).values(event_seq=jobs.c.event_seq + 1)
    seq = conn.execute(counted.returning(jobs.c.event_seq)).scalar()
    if seq is None:
        raise NotFound(f"no job {job_id!r}", param="job_id")
    made = JobEvent(job_id, seq, at, kind, data)
    conn.execute(insert(job_events), vars(made))
    return made


def _job(row: Any) -> Job:
    return Job(**{key: value for key, value in row._mapping.items() if key not in ("seq", "event_seq")})
