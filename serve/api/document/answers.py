"""The shapes of what our routes answer, for the OpenAPI document.

Comes in: the records and what their `to_wire` adds or keeps back. Goes out: pydantic models that FastAPI puts into the
document. No answer is validated against them while the server runs; the tests do that. Must not import vllm or grpc.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from typing_extensions import TypedDict

from noria import records
from noria.access.audit import AuditEvent as AuditRecord
from noria.records import Json

OF_A_TRAINER = ("done", "owner", "lease_until", "heartbeat_at")  # of a job's record: leases and hand-overs stay inside


def wire(record: type, kind: str, *, without: tuple[str, ...] = (), **more: Any) -> type[BaseModel]:
    """A record as `to_wire` shows it: its own fields, all of them there, and `object`."""
    hints = typing.get_type_hints(record)
    names = [field.name for field in dataclasses.fields(record) if field.name not in without]
    fields: Json = {name: (hints[name], ...) for name in names}
    kinds: Json = {"object": (Literal[kind], ...)}
    return create_model(record.__name__, __doc__=record.__doc__, **kinds, **{**fields, **more})


def page_of(item: type[BaseModel]) -> type[BaseModel]:
    """OpenAI's list object over one kind of item."""
    fields: Json = {
        "object": (Literal["list"], ...),
        "data": (list[item], ...),  # type: ignore[valid-type]
        "first_id": (str | None, ...),
        "last_id": (str | None, ...),
        "has_more": (bool, ...),
    }
    return create_model(f"{item.__name__}Page", __doc__="A page; `last_id` is the next page's `after`.", **fields)


def deleted(kind: str, **more: Any) -> type[BaseModel]:
    """What is answered when something is gone."""
    fields: Json = {"id": (str, ...), "object": (Literal[kind], ...), "deleted": (Literal[True], ...), **more}
    name = "".join(word.title() for word in kind.replace(".", "_").split("_"))
    return create_model(name, __doc__="What was deleted.", **fields)


class WireSide(TypedDict, total=False):
    """One side of a preference: `completion_id` and `index`, or `text`."""

    completion_id: str
    index: int
    text: str


class ErrorDetail(BaseModel):
    """What is wrong and what to do; `param` names the field at fault, `code` is a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


SIDES: Json = {"chosen": (WireSide, ...), "rejected": (WireSide, ...)}
Preference = wire(records.Preference, "preference", without=("prompt_hash",), **SIDES)
Feedback = wire(records.Feedback, "feedback")
Job = wire(records.Job, "job", without=OF_A_TRAINER)
Version = wire(records.Version, "version")
Rollout = wire(records.Rollout, "rollout")
AuditEvent = wire(AuditRecord, "audit_event")


class VersionUse(TypedDict):
    """A version whose job used something of somebody who is forgotten; `uses` are counts by part."""

    version: str
    state: str
    job: str
    uses: dict[str, int]


class JobUse(TypedDict):
    """An unfinished job that used it."""

    job: str
    state: str
    uses: dict[str, int]


class Lineage(TypedDict):
    """What learnt from somebody who is forgotten; `inherited` are versions made of those that did."""

    versions: list[VersionUse]
    inherited: list[str]
    jobs: list[JobUse]


class Forgotten(TypedDict):
    """How many forgotten users are in a version's weights, and how much of theirs was used, by part."""

    users: int
    uses: dict[str, int]
    inherited: int


FORGOTTEN_COUNTS = ("completions", "choices", "images", "preferences", "feedback")
EndUserDeleted = deleted("end_user.deleted", lineage=(Lineage, ...), **dict.fromkeys(FORGOTTEN_COUNTS, (int, ...)))
VersionWithManifest = create_model(
    "VersionWithManifest", __base__=Version, manifest=(Json, ...), forgotten=(Forgotten, ...)
)


class Limit(BaseModel):
    """A limit and what is used of it; None is no limit, and what nobody counts."""

    limit: int | None
    used: int | None


class TimedLimit(Limit):
    """A limit that is whole again in `reset_s` seconds."""

    reset_s: float


class Limits(BaseModel):
    """The caller's own limits."""

    object: Literal["limits"]
    key: str
    requests_per_minute: TimedLimit
    concurrent_requests: Limit
    tokens_per_day: TimedLimit
    preferences_per_hour: Limit


class Counts(BaseModel):
    """How many there are, how many no job has used, how many start one."""

    total: int
    unused: int
    needed: int


class Trainer(BaseModel):
    """Whether a trainer lives, and why it does nothing."""

    alive: bool
    idle_reason: str | None


class CaptureTotals(BaseModel):
    """What became of the completions of this server process."""

    sent: int
    stored: int
    dropped: int


class PrivacyTotals(BaseModel):
    """What was redacted, dropped and deleted since the server started."""

    model_config = ConfigDict(extra="allow")

    redacted: dict[str, int]
    metadata_dropped: int


class Status(BaseModel):
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
    job: Job | None  # type: ignore[valid-type]
    rollout: Rollout | None  # type: ignore[valid-type]
    completions: int
    capture: CaptureTotals
    privacy: PrivacyTotals


class StoredCompletion(BaseModel):
    """OpenAI's `chat.completion`, with what the request asked for, and Noria's `model_version` and `finished`."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Json]
    usage: Json
    system_fingerprint: str | None
    metadata: dict[str, str]
    input_user: str | None
    model_version: str
    finished: bool


class StoredMessage(BaseModel):
    """One message of the request."""

    model_config = ConfigDict(extra="allow")

    id: str
    role: str
    content: str | None
    content_parts: list[Json] | None


class Adapter(BaseModel):
    """A loaded policy adapter."""

    object: Literal["adapter"]
    name: str
    version: str
    fingerprint: str
    sha256: str
    rank: int
    ttl_s: float
    expires_at: float
    groups: int


class AdapterList(BaseModel):
    """What is loaded, and what could be."""

    object: Literal["list"]
    data: list[Adapter]
    version: str
    most: int
    max_rank: int


class AdapterDeleted(BaseModel):
    """An adapter that was unloaded."""

    object: Literal["adapter.deleted"]
    name: str
    deleted: Literal[True]


class Sample(BaseModel):
    """One sample; `logprobs` are in nats, one for each of `token_ids`."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    turns: int


class SampleGroup(BaseModel):
    """n answers to one prompt, all from one version."""

    id: str
    object: Literal["sample_group"]
    created: float
    version: str
    fingerprint: str
    adapter: str | None
    prompt_token_ids: list[int]
    logprobs_temperature: float
    samples: list[Sample]
