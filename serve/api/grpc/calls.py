"""What every gRPC call shares: errors from the one table, the version in the metadata.

Comes in: a call's context. Goes out: a status with OpenAI's error object in the trailing metadata.
Must not import vllm.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from noria.errors import NoriaError, openai_body, retry_after, wire_of
from serve.api.errors import internal

ERROR_KEY = "noria-error-bin"
RETRY_KEY = "retry-after"  # whole seconds, as HTTP's header
VERSION_KEY = "x-noria-model-version"

log = logging.getLogger(__name__)


async def abort(context: Any, error: NoriaError) -> None:
    """Ends the call with the error's status."""
    details = json.dumps(openai_body(error)).encode()
    code = grpc.StatusCode[wire_of(error).grpc_status]
    wait_s = retry_after(error)
    metadata = ((ERROR_KEY, details),) if wait_s is None else ((ERROR_KEY, details), (RETRY_KEY, wait_s))
    await context.abort(code, error.message, trailing_metadata=metadata)


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
