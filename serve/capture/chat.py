"""vLLM's chat handler with a tape running beside every answer.

Comes in: the handler's two generators, whole answers and streams. Goes out: the same answers on the wire, signed, and
a `Captured` each to the queue, before the client can have seen the end: it may judge the answer at once.
Must not import vllm at import: the tests of capture are quick.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from noria.settings import CaptureSettings
from serve.capture.queue import CaptureQueue
from serve.capture.tape import Captured, Tape
from serve.engine.signed import Signed
from serve.engine.versions import Trace, current_trace
from serve.input.intake import current_intake

DONE = "data: [DONE]\n\n"
MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512  # OpenAI's limits on metadata


class CapturingChat(Signed):
    """Mixed in before vLLM's `OpenAIServingChat` (0.31) and what derives from it; see `serve.engine.signed.adopt`."""

    noria_capture: CaptureQueue | None  # None keeps nothing, whatever a request says
    noria_settings: CaptureSettings

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """As vLLM's; refuses `store` and `metadata` that OpenAI's API would refuse."""
        wrong = storage_fault(request.model_extra or {})
        if wrong is not None:
            param, message = wrong
            return cast(Any, self).create_error_response(message, param=param)
        return await cast(Any, super()).create_chat_completion(request, raw_request)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: Any, request_id: str, model_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """The whole answer; kept when it is one."""
        tape = self._tape(request, request_id, model_name)
        outputs = tape.listen(result_generator) if tape else result_generator
        answer = await cast(Any, super()).chat_completion_full_generator(
            request, outputs, request_id, model_name, *args, **kwargs
        )
        if tape:
            self._keep(tape, answer if hasattr(answer, "choices") else None)
        return answer

    async def chat_completion_stream_generator(
        self, request: Any, result_generator: Any, request_id: str, model_name: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """The answer in signed chunks; what was sent is kept, also when the client goes away."""
        tape = self._tape(request, request_id, model_name)
        if tape and cast(Any, self).parser_cls is not None:
            tape.captured.chunks = []
        outputs = tape.listen(result_generator) if tape else result_generator
        chunks = cast(Any, super()).chat_completion_stream_generator(
            request, outputs, request_id, model_name, *args, **kwargs
        )
        try:
            async for chunk in chunks:
                if tape and chunk == DONE:
                    self._keep(tape)
                    tape = None
                elif tape and tape.captured.chunks is not None:
                    tape.captured.chunks.append(chunk)
                yield self.sign_chunk(chunk)
        finally:
            await chunks.aclose()
            if hasattr(outputs, "aclose"):
                await outputs.aclose()
            if tape:
                self._keep(tape)

    def _tape(self, request: Any, request_id: str, model_name: str) -> Tape | None:
        """A tape where the answer is to be kept: the request's word, else the operator's."""
        stored = (request.model_extra or {}).get("store")
        if self.noria_capture is None or not (self.noria_settings.default if stored is None else stored):
            return None
        trace = current_trace.get()
        if trace is None:
            trace = Trace(request_id=request_id, streaming=bool(request.stream))
            current_trace.set(trace)
        trace.logprobs = True
        captured = Captured(id=request_id, created_at=time.time(), model=model_name, request=request, trace=trace)
        intake = current_intake.get()
        if intake is not None:
            captured.replaced = intake.replaced
        return Tape(captured)

    def _keep(self, tape: Tape, answer: Any = None) -> None:
        captured = tape.end(answer)
        if captured is not None and self.noria_capture is not None:
            self.noria_capture.offer(captured)


class CapturingMessages(CapturingChat):
    """Mixed in before vLLM's `AnthropicServingMessages` (0.31), which reads neither `store` nor who asks."""

    def to_chat_completion_request(self, asked: Any, **options: Any) -> Any:
        """As vLLM's, with the body's `store`, and with `metadata.user_id` (Anthropic's name for it) as `user`."""
        request = cast(Any, super()).to_chat_completion_request(asked, **options)
        intake = current_intake.get()
        body = intake.body() if intake else {}
        if "store" in body:
            request.store = body["store"]
        user = (body.get("metadata") or {}).get("user_id") or body.get("user")
        if isinstance(user, str):
            request.user = user
        return request


def storage_fault(extra: dict[str, Any]) -> tuple[str, str] | None:
    """The parameter at fault and what is wrong with it; None where `store` and `metadata` are as OpenAI has them."""
    if not isinstance(extra.get("store"), bool | None):
        return "store", "`store` must be true, false or null."
    return metadata_fault(extra.get("metadata"))


def metadata_fault(metadata: Any) -> tuple[str, str] | None:
    """The same for `metadata` alone: up to 16 pairs of text, keys to 64 and values to 512 characters."""
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or len(metadata) > MOST_PAIRS:
        return "metadata", f"`metadata` must be an object of at most {MOST_PAIRS} pairs."
    for key, value in metadata.items():
        if not isinstance(value, str) or len(value) > LONGEST_VALUE or len(key) > LONGEST_KEY:
            return (
                "metadata",
                f"`metadata.{key[:LONGEST_KEY]}` must be text of at most {LONGEST_VALUE} characters under a key of at "
                f"most {LONGEST_KEY}.",
            )
    return None
