"""What every gRPC call shares: errors from the one table, the version in the metadata.

Comes in: a call's context. Goes out: a status with OpenAI's error object in the trailing metadata.
Must not import vllm.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from noria.errors import NoriaError, Unavailable, openai_body, retry_after, wire_of
from serve.api.errors import internal

ERROR_KEY = "noria-error-bin"
MOST_MESSAGE_BYTES, MOST_PARAM_BYTES = 800, 200  # percent-encoded and in JSON they may be nine times as long
RETRY_KEY = "retry-after"  # whole seconds, as HTTP's header
VERSION_KEY = "x-noria-model-version"

log = logging.getLogger(__name__)


async def abort(context: Any, error: NoriaError) -> None:
    """Ends the call with the error's status."""
    body = openai_body(error)
    message = body["error"]["message"] = shortened(error.message, MOST_MESSAGE_BYTES)
    if error.param is not None:
        body["error"]["param"] = shortened(error.param, MOST_PARAM_BYTES)
    details = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    code = grpc.StatusCode[wire_of(error).grpc_status]
    wait_s = retry_after(error)
    metadata = ((ERROR_KEY, details),) if wait_s is None else ((ERROR_KEY, details), (RETRY_KEY, wait_s))
    await context.abort(code, message, trailing_metadata=metadata)


def refusing_unread(error: NoriaError) -> Any:
    """A handler that refuses without reading: one of a stream of requests is called before any of them."""

    async def refuse(requests: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)


def shortened(text: str, most_bytes: int) -> str:
    """The text, cut in its middle where it is longer: a caller refuses metadata of more than 8 KiB, and with it learns
    nothing of why."""
    data = text.encode(errors="replace")
    if len(data) <= most_bytes:
        return text
    half = most_bytes // 2
    return f"{data[:half].decode(errors='ignore')} [..] {data[-half:].decode(errors='ignore')}"


@asynccontextmanager
async def answering(context: Any, method: str) -> AsyncIterator[None]:
    """Around a call's work: whatever it raises becomes a status."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except NoriaError as error:
        await abort(context, error)
    except Exception as error:
        log.exception("call_failed", extra={"method": method})
        await abort(context, internal(error))


async def write(context: Any, message: Any, stalled_s: float) -> None:
    """Sends one piece of a stream, unpacked: a few words grow by packing.

    Raises Unavailable where the client has not made room for it in `stalled_s`.
    """
    context.disable_next_message_compression()
    try:
        async with asyncio.timeout(stalled_s):
            await context.write(message)
    except TimeoutError:
        raise Unavailable(f"the client has not read on for {stalled_s:g} s", code="unread") from None
