"""Every error that Noria raises on purpose, and the one table that puts them on the wire.

Comes in: nothing. Goes out: exception classes and `WIRE`, read by HTTP, gRPC and the command line.
Must not import anything from Noria.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class NoriaError(Exception):
    """Root of all deliberate errors.

    `message` says what is wrong and what to do; `param` names the field or setting at fault;
    `code` is a short stable word for programs; `retry_after_s` says when the same request would be let in, in seconds,
    where that is known.
    """

    code = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class SettingsError(NoriaError):
    """A setting is unknown, out of range, or contradicts another one. Raised while settings load."""

    code = "invalid_settings"


class InvalidRequest(NoriaError):
    """A request is well-formed but wrong. Raised by handlers and the store before anything is written."""

    code = "invalid_request"


class TooLarge(NoriaError):
    """A body is larger than `input.max_body_bytes` or `limits.body_bytes_in_flight`. Raised before it is read."""

    code = "request_too_large"


class NotFound(NoriaError):
    """The thing that a request names does not exist (any more)."""

    code = "not_found"


class Conflict(NoriaError):
    """The request is right but the state of the system forbids it now: a refusal that says why."""

    code = "conflict"


class IntegrityError(NoriaError):
    """Bytes on disk are not what their manifest says. Raised by registry and release validation."""

    code = "integrity_error"


class UnsupportedModel(NoriaError):
    """The architecture, or one of its parameters, is not in the module map."""

    code = "unsupported_model"


class TrainingError(NoriaError):
    """A job cannot go on: non-finite loss, failed verification, no master weights."""

    code = "training_failed"


class Unauthenticated(NoriaError):
    """The call carries no bearer key, or none that the server takes (`noria keys`, `server.api_key`)."""

    code = "invalid_api_key"


class Forbidden(NoriaError):
    """The key is right, but it has no role that may do this."""

    code = "forbidden"


class Unavailable(NoriaError):
    """A part that is needed (engine, store, server) does not answer now; trying again later is right."""

    code = "unavailable"


class RateLimited(NoriaError):
    """The key has used what it may for now (`limits.*`); `retry_after_s` says when it is let in again."""

    code = "rate_limit_exceeded"


class QuotaExceeded(RateLimited):
    """The key has used its tokens of the day (`limits.tokens_per_day`)."""

    code = "insufficient_quota"


class LeaseLost(NoriaError):
    """The job was cancelled or taken over by another trainer. Raised by store heartbeats."""

    code = "lease_lost"


class Superseded(NoriaError):
    """The request is about a version that is no longer the one that serves, or stopped being it meanwhile."""

    code = "version_changed"


@dataclass(frozen=True)
class Wire:
    """How one error class looks on HTTP (status, OpenAI `type`), on gRPC (status name) and in a shell (exit)."""

    http_status: int
    openai_type: str
    grpc_status: str
    exit_code: int


WIRE: dict[type[NoriaError], Wire] = {
    SettingsError: Wire(400, "invalid_request_error", "INVALID_ARGUMENT", 2),
    InvalidRequest: Wire(400, "invalid_request_error", "INVALID_ARGUMENT", 2),
    TooLarge: Wire(413, "invalid_request_error", "INVALID_ARGUMENT", 2),
    NotFound: Wire(404, "not_found_error", "NOT_FOUND", 4),
    Conflict: Wire(409, "conflict_error", "FAILED_PRECONDITION", 5),
    IntegrityError: Wire(422, "integrity_error", "DATA_LOSS", 6),
    UnsupportedModel: Wire(422, "unsupported_model_error", "UNIMPLEMENTED", 6),
    TrainingError: Wire(422, "training_error", "FAILED_PRECONDITION", 6),
    Unauthenticated: Wire(401, "authentication_error", "UNAUTHENTICATED", 3),
    Forbidden: Wire(403, "permission_error", "PERMISSION_DENIED", 3),
    Unavailable: Wire(503, "service_unavailable_error", "UNAVAILABLE", 7),
    RateLimited: Wire(429, "rate_limit_error", "RESOURCE_EXHAUSTED", 7),
    QuotaExceeded: Wire(429, "insufficient_quota", "RESOURCE_EXHAUSTED", 7),
    LeaseLost: Wire(409, "conflict_error", "ABORTED", 5),
    Superseded: Wire(409, "conflict_error", "ABORTED", 5),
    NoriaError: Wire(500, "server_error", "INTERNAL", 1),
}


def wire_of(error: NoriaError) -> Wire:
    """The table's row for an error: its own class's, or the nearest parent's."""
    for cls in type(error).__mro__:
        if cls in WIRE:
            return WIRE[cls]
    return WIRE[NoriaError]


def retry_after(error: NoriaError) -> str | None:
    """What the header `Retry-After` says (RFC 9110, 10.2.3): whole seconds, at least one; None where nobody knows."""
    return None if error.retry_after_s is None else str(max(1, math.ceil(error.retry_after_s)))


def openai_body(error: NoriaError) -> dict[str, Any]:
    """The error as OpenAI's API shapes it: `{"error": {"message", "type", "param", "code"}}`."""
    kind = wire_of(error).openai_type
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
