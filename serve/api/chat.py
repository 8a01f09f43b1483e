"""Answering prompts without HTTP: what gRPC needs of the engine, and vLLM's own chat handler behind it.

Comes in: OpenAI chat bodies as dicts. Goes out: OpenAI answers or chunks as dicts, or a NoriaError.
vLLM is imported inside functions only, so that tests can use the Protocol with an engine of their own.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from noria.errors import InvalidRequest, NoriaError, NotFound, Unavailable, UnsupportedModel
from noria.records import Json
from serve.engine.versions import Trace, VersionGate, current_trace

ERROR_BY_STATUS: dict[int, type[NoriaError]] = {
    400: InvalidRequest,
    404: NotFound,
    422: InvalidRequest,
    429: Unavailable,
    501: UnsupportedModel,
    503: Unavailable,
}


class ChatBackend(Protocol):
    """Something that answers OpenAI chat bodies."""

    async def chat(self, request: Json) -> Json:
        """The whole answer as OpenAI's JSON. Raises NoriaError."""
        ...

    def stream(self, request: Json) -> AsyncGenerator[Json, None]:
        """The answer as OpenAI's chunks; usage comes on the last. Raises NoriaError. To be closed with `aclose()`."""
        ...


class VllmChatBackend:
    """vLLM's chat handler, called as its HTTP route calls it: same checks, same capture, same versions."""

    def __init__(self, state: Any, gate: VersionGate) -> None:
        """`state` is `app.state`; it is read at each call, because a rebuilt engine brings a new handler."""
        self._state = state
        self._gate = gate

    async def chat(self, request: Json) -> Json:
        """One answer."""
        trace = begin_trace(streaming=False)
        try:
            answer: Json = await self._call({**request, "stream": False})
            return answer
        finally:
            self._gate.finish(trace)

    async def stream(self, request: Json) -> AsyncGenerator[Json, None]:
        """One answer in pieces. Closing the generator stops the generation."""
        trace = begin_trace(streaming=True)
        try:
            options = {**request.get("stream_options", {}), "include_usage": True}
            lines = await self._call({**request, "stream": True, "stream_options": options})
            async with aclosing(lines):
                async for line in lines:
                    for chunk in chunks_of(line):
                        yield chunk
        finally:
            self._gate.finish(trace)

    async def _call(self, body: Json) -> Any:
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        handler = self._state.openai_serving_chat
        if handler is None:
            raise UnsupportedModel("the served model does not answer chats")
        try:
            request = ChatCompletionRequest.model_validate(body)
            answer = await handler.create_chat_completion(request, None)
        except ValidationError as error:
            raise invalid_chat(error) from error
        except NoriaError:
            raise
        except Exception as error:  # vLLM's own table knows which of its errors is whose fault
            raise engine_error(create_error_response(error).model_dump()["error"]) from error
        if isinstance(answer, ErrorResponse):
            raise engine_error(answer.model_dump()["error"])
        return answer if body["stream"] else answer.model_dump()


def begin_trace(*, streaming: bool) -> Trace:
    """A new trace, current in this task from now on; the task is the call's own, so nothing needs resetting."""
    trace = Trace(request_id=uuid.uuid4().hex, streaming=streaming)
    current_trace.set(trace)
    return trace


def chunks_of(line: str) -> list[Json]:
    """The chunks in a piece of a server-sent stream. Raises NoriaError when one of them is an error in band."""
    chunks = []
    for part in line.split("\n\n"):
        text = part.removeprefix("data: ").strip()
        if not text or text == "[DONE]" or text.startswith(":"):
            continue
        chunk: Json = json.loads(text)
        if "error" in chunk:
            raise engine_error(chunk["error"])
        chunks.append(chunk)
    return chunks


def engine_error(error: Json) -> NoriaError:
    """vLLM's error object (`message`, `type`, `param`, `code` = HTTP status) as one of ours."""
    kind = ERROR_BY_STATUS.get(int(error["code"]), NoriaError)
    return kind(str(error["message"]), param=error.get("param"))


def invalid_chat(error: Any) -> InvalidRequest:
    """A body that is no chat request, naming the fields as vLLM's HTTP answer names them."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    fields, lines = [], []
    for one in error.errors()[:10]:
        cause = one.get("ctx", {}).get("error")
        fields.append(getattr(cause, "parameter", None) or clean_loc_for_param(("body", *one["loc"])))
        lines.append(f"{fields[-1]}: {one['msg'].removeprefix('Value error, ')}")
    return InvalidRequest("\n".join(lines), param=fields[0])
