"""`/noria/v1/*` on HTTP: a FastAPI router over the handlers.

Comes in: `Handlers`. Goes out: an APIRouter for vLLM's application or a bare one. Bodies go to the handlers as they
are, so that both wires validate in one place. Must not import vllm or grpc.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from noria.errors import InvalidRequest, NotFound
from noria.records import Json
from serve.api.document import answers
from serve.api.document.answers import deleted, page_of
from serve.api.document.routes import KEY, described
from serve.api.errors import NoriaRoute
from serve.api.handlers import Handlers
from serve.api.operations import ENDED
from serve.api.schemas import (
    AuditPage,
    FeedbackBody,
    FeedbackPage,
    JobBody,
    JobPage,
    OrderedPage,
    Page,
    PreferenceBody,
    RolloutBody,
)

KEEP_ALIVE_S = 15.0
MOST_SEQ = 2**63 - 1  # what the store and protobuf can hold
MOST_DIGITS = 19
EVENT: Json = {
    "type": "object",
    "description": "`data` is the event as JSON text: job_id, seq, at, kind, data.",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["id", "event", "data"],
}
EVENTS: Json = {
    "parameters": [
        {
            "name": name,
            "in": place,
            "required": False,
            "description": "The `id` of the last event that came; those after it follow.",
            "schema": {"type": "integer", "minimum": 0, "maximum": MOST_SEQ},
        }
        for name, place in (("Last-Event-ID", "header"), ("after", "query"))
    ],
    "responses": {"200": {"content": {"text/event-stream": {"schema": EVENT}}}},
}


def build_router(handlers: Handlers) -> APIRouter:
    """All routes under `/noria/v1`. Who may call them is decided before (`serve.access.guards.http`)."""
    router = APIRouter(prefix="/noria/v1", route_class=NoriaRoute, tags=["noria"], dependencies=[KEY])
    _add_judgements(router, handlers)
    _add_jobs(router, handlers)
    _add_versions(router, handlers)
    _add_nowhere(router)
    return router


def _add_judgements(router: APIRouter, handlers: Handlers) -> None:
    @router.post(
        "/preferences",
        status_code=201,
        **described({201: answers.Preference, 200: answers.Preference}, 404, 408, body=PreferenceBody),
    )
    async def record_preference(request: Request) -> JSONResponse:
        """Stores a preference: 201, or 200 with the earlier one when the annotator said the same before."""
        preference, created = await handlers.record_preference(await body_of(request))
        return JSONResponse(preference, status_code=201 if created else 200)

    @router.get("/preferences", **described({200: page_of(answers.Preference)}, 404, query=OrderedPage))
    async def list_preferences(request: Request) -> Json:
        """A page of preferences."""
        return await handlers.list_preferences(dict(request.query_params))

    @router.get("/preferences/{preference_id}", **described({200: answers.Preference}, 404))
    async def get_preference(preference_id: str) -> Json:
        """One preference."""
        return await handlers.get_preference(preference_id)

    @router.delete("/preferences/{preference_id}", **described({200: deleted("preference.deleted")}, 404))
    async def delete_preference(preference_id: str) -> Json:
        """Deletes a preference."""
        return await handlers.delete_preference(preference_id)

    @router.post("/feedback", status_code=201, **described({201: answers.Feedback}, 404, 408, body=FeedbackBody))
    async def record_feedback(request: Request) -> JSONResponse:
        """Stores feedback on one choice."""
        return JSONResponse(await handlers.record_feedback(await body_of(request)), status_code=201)

    @router.get("/feedback", **described({200: page_of(answers.Feedback)}, 404, query=FeedbackPage))
    async def list_feedback(request: Request) -> Json:
        """A page of feedback."""
        return await handlers.list_feedback(dict(request.query_params))

    @router.delete("/feedback/{feedback_id}", **described({200: deleted("feedback.deleted")}, 404))
    async def delete_feedback(feedback_id: str) -> Json:
        """Deletes a feedback."""
        return await handlers.delete_feedback(feedback_id)

    @router.delete("/end_users/{user:path}", **described({200: answers.EndUserDeleted}, 404))
    async def forget_end_user(user: str) -> Json:
        """Deletes everything that one end user left."""
        return await handlers.forget_end_user(user)


def _add_jobs(router: APIRouter, handlers: Handlers) -> None:
    @router.post("/jobs", status_code=202, **described({202: answers.Job}, 404, 408, 409, body=JobBody))
    async def create_job(request: Request) -> JSONResponse:
        """Queues a job."""
        return JSONResponse(await handlers.create_job(await body_of(request)), status_code=202)

    @router.get("/jobs", **described({200: page_of(answers.Job)}, query=JobPage))
    async def list_jobs(request: Request) -> Json:
        """A page of jobs."""
        return await handlers.list_jobs(dict(request.query_params))

    @router.get("/jobs/{job_id}", **described({200: answers.Job}, 404))
    async def get_job(job_id: str) -> Json:
        """One job."""
        return await handlers.get_job(job_id)

    @router.post("/jobs/{job_id}/cancel", **described({200: answers.Job}, 404, 409))
    async def cancel_job(job_id: str) -> Json:
        """Asks a job to stop."""
        return await handlers.cancel_job(job_id)

    @router.get("/jobs/{job_id}/events", **described({200: None, 204: None}, 404, more=EVENTS))
    async def watch_job(job_id: str, request: Request) -> Response:
        """The job's events as server-sent events; 204 when it has ended and the caller has seen them all."""
        after = last_event_id(request)
        ended = (await handlers.get_job(job_id))["state"] in ENDED
        events = await handlers.watch_job(job_id, after)
        first = await anext(events, None) if ended else None
        if ended and first is None:
            return Response(status_code=204)  # tells an EventSource not to come back
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(server_sent(first, events), media_type="text/event-stream", headers=headers)


def _add_versions(router: APIRouter, handlers: Handlers) -> None:
    @router.get("/versions", **described({200: page_of(answers.Version)}, query=Page))
    async def list_versions(request: Request) -> Json:
        """A page of versions."""
        return await handlers.list_versions(dict(request.query_params))

    @router.get("/versions/{version_id}", **described({200: answers.VersionWithManifest}, 404))
    async def get_version(version_id: str) -> Json:
        """One version with its manifest."""
        return await handlers.get_version(version_id)

    @router.post("/rollouts", status_code=202, **described({202: answers.Rollout}, 404, 408, 409, body=RolloutBody))
    async def create_rollout(request: Request) -> JSONResponse:
        """Asks for a version to go live."""
        return JSONResponse(await handlers.create_rollout(await body_of(request)), status_code=202)

    @router.get("/rollouts", **described({200: page_of(answers.Rollout)}, query=Page))
    async def list_rollouts(request: Request) -> Json:
        """A page of rollouts."""
        return await handlers.list_rollouts(dict(request.query_params))

    @router.get("/rollouts/{rollout_id}", **described({200: answers.Rollout}, 404))
    async def get_rollout(rollout_id: str) -> Json:
        """One rollout."""
        return await handlers.get_rollout(rollout_id)

    @router.post("/rollback", status_code=202, **described({202: answers.Rollout}, 409))
    async def rollback() -> JSONResponse:
        """Asks for the version that was live before."""
        return JSONResponse(await handlers.rollback(), status_code=202)

    @router.get("/status", **described({200: answers.Status}))
    async def status() -> Json:
        """How things stand."""
        return await handlers.status()

    @router.get("/audit", **described({200: page_of(answers.AuditEvent)}, 404, query=AuditPage))
    async def list_audit_events(request: Request) -> Json:
        """A page of what operators did."""
        return await handlers.list_audit_events(dict(request.query_params))

    @router.get("/limits", **described({200: answers.Limits}))
    async def limits() -> Json:
        """The caller's own limits and what is used of them."""
        return await handlers.limits()


async def body_of(request: Request) -> Any:
    """The JSON body; an empty one is `{}`. Raises InvalidRequest when it is not JSON."""
    raw = await request.body()
    if not raw.strip():
        return {}
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", param="body") from error


def _add_nowhere(router: APIRouter) -> None:
    @router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nowhere(request: Request, path: str) -> Json:
        """Whatever no other route takes, in the same shape as every other error."""
        raise NotFound(f"{request.method} /noria/v1/{path} is no route")


def last_event_id(request: Request) -> int:
    """Where a broken stream goes on: the `Last-Event-ID` header, or `?after=`. Raises InvalidRequest."""
    text = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) > MOST_SEQ:
        raise InvalidRequest(f"Last-Event-ID: {text[:40]!r} is not the id of an event", param="Last-Event-ID")
    return int(text)


async def server_sent(first: Json | None, events: AsyncIterator[Json]) -> AsyncGenerator[str, None]:
    """Each event as `id`, `event` and `data` lines; a comment now and then keeps proxies from closing the line."""
    if first is not None:
        yield event_text(first)
    pending = asyncio.ensure_future(_next(events))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_S)
            if not done:
                yield ": keep-alive\n\n"
                continue
            event = pending.result()
            if event is None:
                return
            yield event_text(event)
            pending = asyncio.ensure_future(_next(events))
    finally:
        pending.cancel()  # ends the handler's generator too, at its next await


async def _next(events: AsyncIterator[Json]) -> Json | None:
    return await anext(events, None)


def event_text(event: Json) -> str:
    """One event in the form of the HTML standard's server-sent events."""
    return f"id: {event['seq']}\nevent: {event['kind']}\ndata: {json.dumps(event)}\n\n"
