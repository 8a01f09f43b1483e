"""`SamplingService` of `noria.v1`: translations around the handlers of `serve.sampling`.

Comes in: the generated servicer's calls. Goes out: its messages. Must not import vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json
from noria.v1 import sampling_pb2, sampling_pb2_grpc
from serve.api.grpc.calls import VERSION_KEY, answering
from serve.api.grpc.chat_messages import messages_to_openai
from serve.api.grpc.convert import fill, to_dict
from serve.sampling.service import Sampling


class SamplingServicer(sampling_pb2_grpc.SamplingServiceServicer):
    """Adapters and groups."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    async def PutAdapter(self, requests: Any, context: Any) -> Any:
        """PUT /noria/v1/adapters/{name}."""
        async with answering(context, "PutAdapter"):
            pieces = aiter(requests)
            first = await anext(pieces, None)
            if first is None:
                raise InvalidRequest("the stream ended before its first message", param="name")
            query = {key: value for key, value in to_dict(first).items() if key != "data"}
            adapter, _ = await self._sampling.put_adapter(query, _data(first, pieces))
            return fill(sampling_pb2.Adapter, adapter)

    async def DeleteAdapter(self, request: Any, context: Any) -> Any:
        """DELETE /noria/v1/adapters/{name}."""
        async with answering(context, "DeleteAdapter"):
            return fill(sampling_pb2.DeleteAdapterResponse, await self._sampling.delete_adapter(request.name))

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/adapters."""
        async with answering(context, "ListAdapters"):
            return fill(sampling_pb2.ListAdaptersResponse, await self._sampling.list_adapters())

    async def SampleGroup(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/samples."""
        async with answering(context, "SampleGroup"):
            group = await self._sampling.sample(request_to_body(request))
            await context.send_initial_metadata(((VERSION_KEY, group["version"]),))
            return fill(sampling_pb2.SampleGroupResponse, group)


def request_to_body(request: Any) -> Json:
    """The body that the same request has on HTTP. Raises InvalidRequest."""
    return {**to_dict(request), "messages": messages_to_openai(request.messages)}


async def _data(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    yield first.data
    async for piece in rest:
        yield piece.data
