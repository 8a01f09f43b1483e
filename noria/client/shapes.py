"""What `/noria/v1` answers, as types: each is the wire's JSON object, a plain dict at run time.

A server may add keys; none is ever renamed. Goes out: TypedDicts.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Verdict = Literal["chosen", "tie", "both_bad"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Stage = Literal["snapshot", "train", "merge", "quantize", "verify", "publish", "rollout"]
VersionState = Literal["candidate", "live", "retired", "rejected"]
RolloutState = Literal["queued", "running", "succeeded", "failed"]


class Side(TypedDict, total=False):
    """One side of a preference: `completion_id` and `index` of a captured choice, or `text`."""

    completion_id: str
    index: int
    text: str


class Preference(TypedDict):
    """Chosen and rejected over one prompt; or a tie, or both bad. Times are seconds since the epoch."""

    id: str
    object: Literal["preference"]
    created_at: float
    chosen: Side
    rejected: Side
    verdict: Verdict
    annotator: str | None
    comment: str | None
    source: Literal["preference", "edit"]


class Feedback(TypedDict):
    """What one person says of one choice; `preference_id` is the preference that an edit made."""

    id: str
    object: Literal["feedback"]
    created_at: float
    completion_id: str
    index: int
    rating: int | None
    thumb: Literal["up", "down"] | None
    edit: str | None
    comment: str | None
    annotator: str | None
    preference_id: str | None


class AuditEvent(TypedDict):
    """What somebody did to the system: `result` is `ok` or an error's code, `wire` is http, grpc or cli."""

    object: str
    id: str
    at: float
    key_id: str
    name: str
    action: str
    target: str | None
    result: str
    wire: str


class Deleted(TypedDict):
    """What was deleted."""

    id: str
    object: str
    deleted: bool


class ForgottenEndUser(Deleted):
    """How much of each one end user had left, and what had learnt from it."""

    completions: int
    choices: int
    preferences: int
    feedback: int
    images: int
    lineage: dict[str, Any]


class Job(TypedDict):
    """One run of the pipeline; `progress` is 0 to 1 over all stages."""

    id: str
    object: Literal["job"]
    method: str
    state: JobState
    stage: Stage
    progress: float
    metrics: dict[str, Any]
    version: str | None
    error: dict[str, Any] | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    settings: dict[str, Any]
    rollout: str
    attempt: int
    reason: str
    cancel_requested: bool


class JobEvent(TypedDict):
    """One line of a job's history; `seq` grows by one."""

    job_id: str
    seq: int
    at: float
    kind: Literal["state", "stage", "progress", "metrics", "log", "error"]
    data: dict[str, Any]


class Version(TypedDict):
    """One immutable published model; `manifest` and `forgotten` come where one version is asked for."""

    id: str
    object: Literal["version"]
    parent: str | None
    state: VersionState
    method: str
    job: str | None
    created_at: float
    metrics: dict[str, Any]
    frozen: dict[str, str]
    manifest: NotRequired[dict[str, Any]]
    forgotten: NotRequired[dict[str, Any]]


class Rollout(TypedDict):
    """One attempt to put a version live; `reason` is why it failed."""

    id: str
    object: Literal["rollout"]
    version: str
    previous: str | None
    strategy: str
    state: RolloutState
    created_at: float
    percent: int | None
    reason: str | None
    finished_at: float | None
    metrics: dict[str, Any]


class Counts(TypedDict):
    """How many there are, are in no job's snapshot yet, and start a job by themselves."""

    total: int
    unused: int
    needed: int


class Trainer(TypedDict):
    """Whether a trainer gave a sign of life lately, and why no job runs."""

    alive: bool
    idle_reason: str | None


class Capture(TypedDict):
    """sent = stored + dropped once nothing waits any more."""

    sent: int
    stored: int
    dropped: int


class Status(TypedDict):
    """How things stand."""

    object: Literal["status"]
    live: str | None
    serving: str
    previous: str | None
    fingerprint: str
    in_flight: int
    preferences: Counts
    thumbs: Counts
    method: str
    trainer: Trainer
    job: Job | None
    rollout: Rollout | None
    completions: int
    capture: Capture
