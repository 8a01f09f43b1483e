"""The request bodies of `/noria/v1`, closed to unknown fields, and how a broken one is reported.

Comes in: JSON values, from HTTP or from gRPC. Goes out: validated models, or InvalidRequest naming the field.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from noria.errors import InvalidRequest
from noria.records import Json, Side, Verdict

COLDEST = 0.01  # the lowest temperature above 0 that vLLM 0.31 draws at; a lower one it raises to this, in silence


class Body(BaseModel):
    """A request body: an unknown field is refused, so that a typing error is not silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SideBody(Body):
    """One side of a preference: `{"completion_id", "index"}`, or `{"text"}` for an answer of the annotator's own."""

    completion_id: str | None = Field(None, min_length=1)
    index: int | None = None
    text: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        captured = self.completion_id is not None or self.index is not None
        if captured == (self.text is not None):
            raise ValueError("give either completion_id and index, or text")
        if captured and (self.completion_id is None or self.index is None):
            raise ValueError("completion_id and index belong together")
        return self

    def side(self) -> Side:
        """The record."""
        return Side(self.completion_id, self.index, self.text)


class PreferenceBody(Body):
    """`POST /noria/v1/preferences`."""

    chosen: SideBody
    rejected: SideBody
    verdict: Verdict = "chosen"
    annotator: str | None = Field(None, max_length=256)
    comment: str | None = Field(None, max_length=10_000)


class FeedbackBody(Body):
    """`POST /noria/v1/feedback`: at least one of rating, thumb, edit, comment."""

    completion_id: str = Field(min_length=1)
    index: int
    rating: int | None = Field(None, ge=1, le=5)
    thumb: Literal["up", "down"] | None = None
    edit: str | None = Field(None, min_length=1)
    comment: str | None = Field(None, min_length=1, max_length=10_000)
    annotator: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rating is None and self.thumb is None and self.edit is None and self.comment is None:
            raise ValueError("give at least one of rating, thumb, edit, comment")
        return self


class JobBody(Body):
    """`POST /noria/v1/jobs`. `settings` is a part of the tree under `train`; the rest is as the server has it."""

    method: str | None = None
    settings: Json = Field(default_factory=dict)
    rollout: str | None = None


class RolloutBody(Body):
    """`POST /noria/v1/rollouts`."""

    version: str = Field(min_length=1)
    strategy: str = "direct"
    percent: int | None = Field(None, ge=1, le=100)


class SampleBody(Body):
    """`POST /noria/v1/samples`: n answers to one prompt, for a trainer. `version` is the one that has to answer."""

    messages: list[Json] = Field(min_length=1)
    n: int = Field(1, ge=1, le=256)
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1)
    max_tokens: int = Field(256, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    adapter: str | None = Field(None, min_length=1)
    version: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _draws(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n samples of temperature 0 are one sample; draw at a temperature above 0, or n = 1")
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"the engine draws at 0, or at {COLDEST:g} and above, not at {self.temperature:g}")
        return self


class AdapterQuery(Body):
    """`PUT /noria/v1/adapters/{name}?version=..&ttl_s=..`: the version that the adapter was made for, and its lease."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    ttl_s: float = Field(600.0, gt=0, le=86_400, allow_inf_nan=False)


class Page(Body):
    """How a list is read: what comes after which id, how much, in which order of time."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


class OrderedPage(Page):
    """A page of records, newest first unless `order` is `asc`."""

    order: Literal["asc", "desc"] = "desc"
    annotator: str | None = None


class FeedbackPage(OrderedPage):
    """A page of feedback, also of one completion only."""

    completion_id: str | None = None


class AuditPage(Page):
    """A page of the audit log, newest first unless `order` is `asc`; also of one key or action only."""

    order: Literal["asc", "desc"] = "desc"
    key_id: str | None = None
    action: str | None = None


class JobPage(Page):
    """A page of jobs, newest first, also of one state only."""

    state: Literal["queued", "running", "succeeded", "failed", "cancelled"] | None = None


B = TypeVar("B", bound=BaseModel)


def parse(model: type[B], body: object) -> B:
    """The validated body. Raises InvalidRequest with one line per wrong field; `param` is the first of them."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body must be a JSON object", param="body")
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        raise invalid(error.errors()) from error


def invalid(errors: Iterable[Any]) -> InvalidRequest:
    """Pydantic's list of errors as one InvalidRequest."""
    fields, lines = [], []
    for one in errors:
        fields.append(".".join(str(part) for part in one["loc"]) or "body")
        lines.append(f"{fields[-1]}: {_saying(one)}")
    return InvalidRequest("\n".join(lines), param=fields[0])


def _saying(one: Mapping[str, Any]) -> str:
    if one["type"] == "extra_forbidden":
        return "unknown field"
    return str(one["msg"]).removeprefix("Value error, ")


def listing(rows: Sequence[Json], limit: int) -> Json:
    """OpenAI's list object from up to `limit + 1` rows: the one too many only says that there are more."""
    data = list(rows[:limit])
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(rows) > limit}


def cut(rows: Sequence[Json], page: Page) -> Json:
    """A page out of a list that is short enough to be read whole. Raises InvalidRequest when `after` is not in it."""
    start = 0
    if page.after is not None:
        ids = [row["id"] for row in rows]
        if page.after not in ids:
            raise InvalidRequest(f"after: there is no {page.after!r} in this list", param="after")
        start = ids.index(page.after) + 1
    return listing(rows[start : start + page.limit + 1], page.limit)
