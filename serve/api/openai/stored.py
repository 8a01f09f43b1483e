"""OpenAI's stored chat completions over the store.

Comes in: GET, POST and DELETE under `/v1/chat/completions`. Goes out: OpenAI's schema and paging. An answer just given
is there: the routes wait for its commit first. A key with the role `client` alone sees what was asked with it, and no
other; to it, the rest does not exist. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

from fastapi import APIRouter, Request
from pydantic import Field

from noria.blobs import Blobs
from noria.errors import InvalidRequest, NotFound
from noria.records import Completion, Json
from noria.store import Store
from serve.access.audit import Audit
from serve.access.caller import Role, current_caller
from serve.api.document import answers
from serve.api.document.answers import deleted, page_of
from serve.api.document.routes import KEY, described, json_body
from serve.api.errors import NoriaRoute
from serve.api.openai.shapes import completion_object, page, store_messages
from serve.api.schemas import Body
from serve.capture.chat import LONGEST_KEY, LONGEST_VALUE, MOST_PAIRS, metadata_fault
from serve.privacy.scrub import Scrubber

METADATA = re.compile(r"metadata\[(.+)\]")
LARGEST_PAGE = 100
READERS: frozenset[Role] = frozenset({"annotator", "operator"})
CHANGERS: frozenset[Role] = frozenset({"operator"})
LONGEST_NUMBER = 9  # digits; Python refuses to read thousands of them
METADATA_SCHEMA: Json = {
    "type": ["object", "null"],
    "maxProperties": MOST_PAIRS,
    "propertyNames": {"maxLength": LONGEST_KEY},
    "additionalProperties": {"type": "string", "maxLength": LONGEST_VALUE},
}
METADATA_BODY = json_body({"type": "object", "properties": {"metadata": METADATA_SCHEMA}, "required": ["metadata"]})
BY_METADATA: Json = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only completions with these pairs: `metadata[key]=value`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


class MessagesQuery(Body):
    """How a page of messages is read, for the document; `paging` does the reading."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=LARGEST_PAGE)
    order: Literal["asc", "desc"] = "asc"


class StoredQuery(MessagesQuery):
    """The same for completions, also of one model only."""

    model: str | None = None


class Flushes(Protocol):
    """What this module needs of the capture queue."""

    async def flush(self, completion_id: str | None = None) -> None:
        """Returns when that completion, or all, is committed or dropped."""


def build_stored_router(store: Store, blobs: Blobs, capture: Flushes, audit: Audit, scrubber: Scrubber) -> APIRouter:
    """The five routes, for vLLM's application; `scrubber` cuts metadata to what may be kept."""
    router = APIRouter(
        prefix="/v1/chat/completions", route_class=NoriaRoute, tags=["stored completions"], dependencies=[KEY]
    )

    @router.get("", **described({200: page_of(answers.StoredCompletion)}, 404, query=StoredQuery, more=BY_METADATA))
    async def list_completions(request: Request) -> Json:
        """A page of stored completions, filtered by model and metadata."""
        query = request.query_params
        limit, order = paging(query)
        await capture.flush()
        found = await asyncio.to_thread(
            store.list_completions,
            after=query.get("after"),
            limit=limit + 1,
            order=order,
            metadata=metadata_filter(query) or None,
            model=query.get("model"),
            key_id=_own(READERS),
        )
        return page([completion_object(one) for one in found], limit)

    @router.get("/{completion_id}", **described({200: answers.StoredCompletion}, 404))
    async def get_completion(completion_id: str) -> Json:
        """One stored completion."""
        return completion_object(await _read(store, capture, completion_id))

    @router.post(
        "/{completion_id}", **described({200: answers.StoredCompletion}, 404, 408, more={"requestBody": METADATA_BODY})
    )
    async def update_completion(completion_id: str, request: Request) -> Json:
        """Replaces the metadata; nothing else can be changed."""
        metadata = await asyncio.to_thread(scrubber.metadata, await _metadata_of(request))
        await _read(store, capture, completion_id, CHANGERS)
        return completion_object(await asyncio.to_thread(store.set_completion_metadata, completion_id, metadata))

    @router.delete("/{completion_id}", **described({200: deleted("chat.completion.deleted")}, 404))
    async def delete_completion(completion_id: str) -> Json:
        """Deletes one, with its judgements and the pictures that no other shows."""
        async with audit.action("delete_completion", completion_id):
            await _read(store, capture, completion_id, CHANGERS)
            pictures = await asyncio.to_thread(store.delete_completion, completion_id)
            await asyncio.to_thread(store.drop_pictures, pictures, blobs.delete)
        return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}

    @router.get(
        "/{completion_id}/messages",
        **described({200: page_of(answers.StoredMessage)}, 404, query=MessagesQuery),
    )
    async def list_messages(completion_id: str, request: Request) -> Json:
        """A page of the messages that the request held, pictures as data URLs."""
        limit, order = paging(request.query_params)
        completion = await _read(store, capture, completion_id)
        return await asyncio.to_thread(
            messages_page, completion, blobs, request.query_params.get("after"), limit, order
        )

    return router


def messages_page(completion: Completion, blobs: Blobs, after: str | None, limit: int, order: str) -> Json:
    """One page of the messages. Raises NotFound where `after` names none of them."""
    types = {image.sha256: image.media_type for image in completion.images}

    def picture(sha256: str) -> str | None:
        try:
            data = blobs.get(sha256)
        except NotFound:
            return None
        return f"data:{types.get(sha256, 'application/octet-stream')};base64,{base64.b64encode(data).decode()}"

    messages = store_messages(completion, picture)
    if order == "desc":
        messages.reverse()
    if after is not None:
        places = [index for index, message in enumerate(messages) if message["id"] == after]
        if not places:
            raise NotFound(f"no message {after!r} in completion {completion.id!r}", param="after")
        messages = messages[places[0] + 1 :]
    return page(messages, limit)


def paging(query: Mapping[str, str]) -> tuple[int, Literal["asc", "desc"]]:
    """`limit` (1 to 100, 20 unless told) and `order` (asc unless told). Raises InvalidRequest."""
    limit, order = query.get("limit", "20"), query.get("order", "asc")
    if not limit.isdecimal() or len(limit) > LONGEST_NUMBER or not 1 <= int(limit) <= LARGEST_PAGE:
        raise InvalidRequest(f"limit={limit!r} is not a number from 1 to {LARGEST_PAGE}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order={order!r} is neither 'asc' nor 'desc'", param="order")
    return int(limit), cast(Literal["asc", "desc"], order)


def metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    """The pairs of `metadata[key]=value` in a query string."""
    return {match[1]: value for key, value in query.items() if (match := METADATA.fullmatch(key))}


async def _read(store: Store, capture: Flushes, completion_id: str, whole: frozenset[Role] = READERS) -> Completion:
    """The completion; to the roles in `whole` everyone's, to others their own. Raises NotFound."""
    await capture.flush(completion_id)
    found = await asyncio.to_thread(store.get_completion, completion_id)
    own = _own(whole)
    if own is not None and found.key_id != own:
        raise NotFound(f"no stored completion {completion_id!r}", param="completion_id")
    return found


def _own(whole: frozenset[Role]) -> str | None:
    """The key whose completions are shown; None is everyone's."""
    caller = current_caller.get()
    return None if caller.roles & whole else caller.key_id


async def _metadata_of(request: Request) -> dict[str, str]:
    try:
        body: Any = await request.json()
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", param="body") from error
    if not isinstance(body, dict) or "metadata" not in body:
        raise InvalidRequest("the body must be an object with `metadata`", param="metadata")
    wrong = metadata_fault(body["metadata"])
    if wrong is not None:
        raise InvalidRequest(wrong[1], param=wrong[0])
    return body["metadata"] or {}
