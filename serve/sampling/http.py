"""Sampling on HTTP: `/noria/v1/adapters` and `/noria/v1/samples`.

Comes in: a `Sampling`. Goes out: an APIRouter, to be included before the rest of `/noria/v1` (whose last route answers
whatever no other took). Must not import vllm or grpc.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from noria.errors import NoriaError, Unavailable
from noria.records import Json
from serve.api.document.answers import Adapter, AdapterDeleted, AdapterList, SampleGroup
from serve.api.document.routes import KEY, described
from serve.api.errors import NoriaRoute
from serve.api.http import body_of
from serve.api.schemas import AdapterQuery, SampleBody
from serve.sampling.service import Sampling

MOST_REFUSED_BYTES = 256 * 2**20
UPLOAD: Json = {
    "required": True,
    "description": "Eight bytes, the length of adapter_config.json as an unsigned little-endian number; that file; "
    "then adapter_model.safetensors.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


def build_sampling_router(sampling: Sampling) -> APIRouter:
    """The routes. Who may call them is decided before (`serve.access.guards.http`)."""
    router = APIRouter(prefix="/noria/v1", route_class=NoriaRoute, tags=["sampling"], dependencies=[KEY])

    @router.put(
        "/adapters/{name}",
        **described(
            {201: Adapter, 200: Adapter},
            404,
            408,
            409,
            query=AdapterQuery,
            path=("name",),
            more={"requestBody": UPLOAD},
        ),
    )
    async def put_adapter(name: str, request: Request) -> JSONResponse:
        """Loads a policy adapter: 201, or 200 where the same bytes are loaded under that name already."""
        query, body = {**request.query_params, "name": name}, request.stream()
        try:
            adapter, created = await sampling.put_adapter(query, body)
        except NoriaError:
            await read_on(body)
            raise
        return JSONResponse(adapter, status_code=201 if created else 200)

    @router.get("/adapters", **described({200: AdapterList}))
    async def list_adapters() -> Json:
        """What is loaded, and what could be."""
        return await sampling.list_adapters()

    @router.delete("/adapters/{name}", **described({200: AdapterDeleted}, 404, 409))
    async def delete_adapter(name: str) -> Json:
        """Unloads an adapter."""
        return await sampling.delete_adapter(name)

    @router.post("/samples", **described({200: SampleGroup}, 404, 408, 409, body=SampleBody))
    async def sample_group(request: Request) -> Json:
        """A group of samples."""
        body = await body_of(request)
        return await while_connected(request, sampling.sample(body))

    return router


async def read_on(body: AsyncIterator[bytes]) -> None:
    """Takes the rest of an upload that was refused: a client that still sends may never see why, were it cut off."""
    left = MOST_REFUSED_BYTES
    async for chunk in body:
        left -= len(chunk)
        if left < 0:
            return


async def while_connected(request: Request, work: Coroutine[None, None, Json]) -> Json:
    """The work's result; a client who goes away cancels it. Raises Unavailable then, to nobody."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Unavailable("the client left")
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
