"""How a route describes itself: what FastAPI's decorators take so that the OpenAPI document tells of raw bodies too.

Comes in: the pydantic schemas that the handlers validate with, the shapes of answers. Goes out: keyword arguments of a
route. Nothing here decides when a request comes. Must not import vllm or grpc.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from noria.records import Json
from serve.api.document.answers import ErrorAnswer

KEY: Any = Depends(HTTPBearer(auto_error=False, description="A key; asked for as soon as the server has one."))
"""Tells the document that a route takes a key. Who may come in is decided before (`serve.access.guards.http`)."""
ALWAYS = {
    400: "The request is wrong; `error.param` names the field.",
    401: "The key is missing or wrong.",
    403: "The key has no role that may do this.",
    413: "The request is larger than this server takes.",
    422: "What is stored cannot be used: its bytes are not what they were, or its kind is not supported.",
    429: "Too many requests; `Retry-After` says when to come back.",
    503: "A part that is needed does not answer now: try again.",
}
OFTEN = {
    404: "There is no such thing (any more).",
    408: "The request did not arrive in time.",
    409: "The state of the system forbids it now; the message says why.",
}


def described(
    answers: Mapping[int, Any],
    *errors: int,
    body: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    path: tuple[str, ...] = (),
    more: Json | None = None,
) -> Json:
    """Keyword arguments for a route of ours.

    `answers` are the shapes by status (None: nothing comes with it); `errors` those of `OFTEN` that it can end with.
    `body` and `query` are read by the handler; fields of `query` that are in `path` are left out. `more` is further
    OpenAPI of the operation.
    """
    responses: dict[int, Json] = {status: {"model": shape} if shape else {} for status, shape in answers.items()}
    for status, text in {**ALWAYS, **{one: OFTEN[one] for one in errors}}.items():
        responses[status] = {"model": ErrorAnswer, "description": text}
    extra: Json = dict(more or {})
    if body is not None:
        required = any(field.is_required() for field in body.model_fields.values())
        extra["requestBody"] = json_body(schema_of(body), required=required)
    if query is not None:
        extra["parameters"] = [*extra.get("parameters", []), *query_parameters(query, without=path)]
    return {"response_model": None, "responses": responses, "openapi_extra": extra}


def json_body(schema: Json, *, required: bool = True) -> Json:
    """The body of an operation."""
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def query_parameters(model: type[BaseModel], without: tuple[str, ...] = ()) -> list[Json]:
    """Each field of the model as a parameter of the query string."""
    schema = schema_of(model)
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": without_null(one)}
        for name, one in schema["properties"].items()
        if name not in without
    ]


def schema_of(model: type[BaseModel]) -> Json:
    """The model's JSON schema in one piece: its references are put where they are used (none of ours is recursive)."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    whole: Json = _inlined(schema, definitions)
    return whole


def without_null(schema: Json) -> Json:
    """A query string has no null: what may be left out is left out."""
    kinds = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    kept = {key: one for key, one in schema.items() if key not in ("anyOf", "default") or one is not None}
    if len(kinds) == 1:
        kept = {**{key: one for key, one in kept.items() if key != "anyOf"}, **kinds[0]}
    return kept


def _inlined(value: Any, definitions: Json) -> Any:
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(one, definitions) for key, one in value.items()}
    if isinstance(value, list):
        return [_inlined(one, definitions) for one in value]
    return value
