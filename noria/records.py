"""The nouns of Noria as frozen values, the same from wire to table to manifest.

Comes in: plain values. Goes out: dataclasses that store, server and trainer hand to each other, and which pictures
messages show.
Times are seconds since the epoch (float); `*_s` are durations in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Module = Literal["vision_tower", "aligner", "language_model"]
Verdict = Literal["chosen", "tie", "both_bad"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Stage = Literal["snapshot", "train", "merge", "quantize", "verify", "publish", "rollout"]
VersionState = Literal["candidate", "live", "retired", "rejected"]
RolloutState = Literal["queued", "running", "succeeded", "failed"]

MODULES: tuple[Module, ...] = ("vision_tower", "aligner", "language_model")
STAGES: tuple[Stage, ...] = ("snapshot", "train", "merge", "quantize", "verify", "publish", "rollout")
BLOB_SCHEME = "noria-blob:"  # an image in stored messages: {"type":"image_url","image_url":{"url":"noria-blob:SHA256"}}
PICTURE_PARTS = ("image_url", "image", "input_image")  # types of a message's parts that show a picture


def image_references(messages: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the pictures of OpenAI messages are called, in the order in which the messages show them.

    One for each picture, as it stands there: a stored one is `noria-blob:SHA256`; "" where a part names none.
    """
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return tuple(_reference(part) for part in parts if isinstance(part, Mapping) and part.get("type") in PICTURE_PARTS)


def _reference(part: Mapping[str, Any]) -> str:
    shown = part.get("image_url")
    url = shown.get("url") if isinstance(shown, Mapping) else shown
    return url if isinstance(url, str) else ""


@dataclass(frozen=True)
class Image:
    """One stored picture. `sha256` is that of the file's bytes as received."""

    sha256: str
    media_type: str
    size_bytes: int
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Choice:
    """One of a completion's n answers.

    `token_ids` and `logprobs` have the same length: the sampled tokens and their raw log-probabilities (nats).
    `message` is OpenAI's assistant message (role, content, tool_calls, ...).
    """

    index: int
    text: str
    message: Json
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """One answered request. In `messages` every image is a `noria-blob:SHA256` URL; `params` is the rest of the body.

    `finished` is False when the client went away or the engine stopped before the last token.
    """

    id: str
    created_at: float
    model: str
    model_version: str
    messages: tuple[Json, ...]
    params: Json
    prompt_hash: str
    choices: tuple[Choice, ...]
    images: tuple[Image, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    end_user: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    usage: Json = field(default_factory=dict)
    system_fingerprint: str | None = None
    ttft_s: float | None = None
    duration_s: float | None = None
    finished: bool = True
    key_id: str | None = None  # of the key it was asked with


@dataclass(frozen=True)
class Side:
    """One side of a preference: a captured choice, or a text of the annotator's own (an edit)."""

    completion_id: str | None = None
    index: int | None = None
    text: str | None = None

    def to_wire(self) -> Json:
        """`{"completion_id", "index"}` or `{"text"}`."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Preference:
    """Chosen and rejected over one prompt; or a tie, or both bad."""

    id: str
    created_at: float
    prompt_hash: str
    chosen: Side
    rejected: Side
    verdict: Verdict = "chosen"
    annotator: str | None = None
    comment: str | None = None
    source: Literal["preference", "edit"] = "preference"

    def to_wire(self) -> Json:
        """The wire's shape of a preference."""
        return {
            "id": self.id,
            "object": "preference",
            "created_at": self.created_at,
            "chosen": self.chosen.to_wire(),
            "rejected": self.rejected.to_wire(),
            "verdict": self.verdict,
            "annotator": self.annotator,
            "comment": self.comment,
            "source": self.source,
        }


@dataclass(frozen=True)
class Feedback:
    """What one person says of one choice: at least one of rating (1..5), thumb (up|down), edit (text), comment."""

    id: str
    created_at: float
    completion_id: str
    index: int
    rating: int | None = None
    thumb: Literal["up", "down"] | None = None
    edit: str | None = None
    comment: str | None = None
    annotator: str | None = None
    preference_id: str | None = None  # the preference (edited over original) that an edit made

    def to_wire(self) -> Json:
        """The wire's shape of a feedback."""
        return {"object": "feedback", **asdict(self)}


@dataclass(frozen=True)
class Pair:
    """One training pair with everything a trainer needs: prompt messages (images as blob URLs) and two answers."""

    preference_id: str
    prompt_hash: str
    messages: tuple[Json, ...]
    chosen: str
    rejected: str
    created_at: float
    annotator: str | None = None
    images: tuple[str, ...] = ()  # the messages' `image_references`
    chosen_cut: bool = False  # the answer ran into its limit of tokens: the model did not end its turn there
    rejected_cut: bool = False


@dataclass(frozen=True)
class Thumb:
    """One answer that somebody found good (`up`) or bad, with everything a trainer needs, as `Pair` has it."""

    feedback_id: str
    prompt_hash: str
    messages: tuple[Json, ...]
    answer: str
    up: bool
    created_at: float
    annotator: str | None = None
    images: tuple[str, ...] = ()  # the messages' `image_references`
    cut: bool = False  # the answer ran into its limit of tokens: the model did not end its turn there


@dataclass(frozen=True)
class Snapshot:
    """A frozen, hashed list of judgements. `id` is `snap_` and the SHA-256 of its canonical content."""

    id: str
    job_id: str
    created_at: float
    train: tuple[str, ...]  # ids of preferences, or of feedback where the job learns from thumbs
    held_out: tuple[str, ...]
    counts: dict[str, int]  # used, held_out, tie, both_bad, duplicate, contradictory, ...
    left_out: tuple[str, ...] = ()  # looked at and not used (duplicates, ...): not "unused" any more


@dataclass(frozen=True)
class Job:
    """One run of the pipeline. `done` maps each finished stage to what it handed on (JSON, small)."""

    id: str
    method: str
    state: JobState
    stage: Stage
    progress: float
    created_at: float
    settings: Json = field(default_factory=dict)
    rollout: str = "none"
    metrics: Json = field(default_factory=dict)
    version: str | None = None
    error: Json | None = None
    done: dict[str, Json] = field(default_factory=dict)
    attempt: int = 0
    owner: str | None = None
    lease_until: float | None = None
    heartbeat_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    cancel_requested: bool = False
    reason: str = "operator"  # who or what asked for it: operator, min_preferences, window

    def to_wire(self) -> Json:
        """DESIGN's job shape; leases and hand-overs stay inside."""
        keys = ["id", "method", "state", "stage", "progress", "metrics", "version", "error"]
        keys += ["created_at", "started_at", "finished_at"]
        more = {k: getattr(self, k) for k in ("settings", "rollout", "attempt", "reason", "cancel_requested")}
        return {"object": "job", **{k: getattr(self, k) for k in keys}, **more}


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history. `seq` grows by one per job; `kind`: state, stage, progress, metrics, log, error."""

    job_id: str
    seq: int
    at: float
    kind: str
    data: Json

    def to_wire(self) -> Json:
        """The wire's shape of an event."""
        return asdict(self)


@dataclass(frozen=True)
class Version:
    """One immutable published model, as the registry's table knows it; the manifest in its folder is the truth."""

    id: str
    parent: str | None
    state: VersionState
    method: str
    job: str | None
    created_at: float
    metrics: Json = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)  # module -> "sha256:.." over its serving tensors

    def to_wire(self) -> Json:
        """DESIGN's version shape."""
        return {"object": "version", **asdict(self)}


@dataclass(frozen=True)
class Rollout:
    """One attempt to put a version live."""

    id: str
    version: str
    previous: str | None
    strategy: str
    state: RolloutState
    created_at: float
    percent: int | None = None
    reason: str | None = None  # why it failed
    finished_at: float | None = None
    metrics: Json = field(default_factory=dict)  # validate_s, drain_s, pause_s, reload_s, probe

    def to_wire(self) -> Json:
        """DESIGN's rollout shape."""
        return {"object": "rollout", **asdict(self)}


@dataclass(frozen=True)
class Evaluation:
    """What one version scored on one set of questions. Two compare when `set_hash` and `sampling` are the same.

    `scores` is `{"score", "low", "high", "n", "categories": {..}}` with 95 % Wilson intervals; `counts` are questions,
    failed (the server refused them; they count as wrong), cut (by the limit of tokens), bad_rows (left out); `run` says
    through which server (`live` or `aside`), in how many seconds.
    """

    id: str
    version: str
    set_name: str
    set_hash: str
    created_at: float
    sampling: Json
    scores: Json
    counts: dict[str, int] = field(default_factory=dict)
    run: Json = field(default_factory=dict)

    def to_wire(self) -> Json:
        """The shape of an evaluation in JSON."""
        return {"object": "evaluation", **asdict(self)}


@dataclass(frozen=True)
class EvaluationAnswer:
    """One question of an evaluation, as it was asked, answered and judged. `pictures` are sha256 of their files."""

    position: int
    question_id: str
    category: str
    question: str
    pictures: tuple[str, ...]
    expected: tuple[str, ...]
    metric: str
    answer: str
    score: float
    finish_reason: str | None = None
    error: str | None = None

    def to_wire(self) -> Json:
        """The shape of an answer in JSON."""
        return asdict(self)


@dataclass(frozen=True)
class BadRow:
    """A row of data or of questions that was left out: the file (or data set) it is in, its line (from 1), and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class ProcessInfo:
    """A live server or trainer, as its last heartbeat told: `kind` is server or trainer; `info` is small JSON."""

    id: str
    kind: Literal["server", "trainer"]
    heartbeat_at: float
    info: Json = field(default_factory=dict)  # server: serving, url; trainer: idle_reason, job
