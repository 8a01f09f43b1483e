"""Errors on HTTP: every NoriaError, and every body that does not validate, as OpenAI's API shapes them.

Comes in: exceptions of the `/noria/v1` routes. Goes out: `NoriaRoute`, a route class that answers them itself, so that
the routes behave alike in a bare FastAPI application and inside vLLM's, which has exception handlers of its own.
Must not import vllm or grpc.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from noria.errors import NoriaError, Unavailable, openai_body, retry_after, wire_of
from serve.api.schemas import invalid

log = logging.getLogger(__name__)


def error_response(error: NoriaError) -> JSONResponse:
    """The error with the status that the table gives it, and `Retry-After` where it is known when to come back."""
    wait_s = retry_after(error)
    headers = None if wait_s is None else {"retry-after": wait_s}
    return JSONResponse(openai_body(error), status_code=wire_of(error).http_status, headers=headers)


class NoriaRoute(APIRoute):
    """A route that turns what its handler raises into OpenAI-shaped answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps FastAPI's handler."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except NoriaError as error:
                return error_response(error)
            except RequestValidationError as error:
                return error_response(invalid(error.errors()))
            except ClientDisconnect:
                return error_response(Unavailable("the client left"))  # to nobody
            except Exception as error:
                log.exception("request_failed", extra={"path": self.path_format})  # a path may name an end user
                return error_response(internal(error))

        return answer


def internal(error: Exception) -> NoriaError:
    """What a caller learns of a bug: its kind, not its text."""
    return NoriaError(f"internal error ({type(error).__name__}); the server's log has it")
