"""Takes one answer down while it is given.

Comes in: the engine's outputs as the handler sees them. Goes out: a `Captured`, raw: only references and appends
here, on the event loop; everything that costs time (decoding, hashing, writing) is the writer thread's.
Must not import vllm.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.access.caller import current_caller
from serve.engine.versions import Trace
from serve.input.pictures.admit import Admitted


@dataclass
class ChoiceTape:
    """One choice as it grows: token ids, the engine's log-probability entries and text, in pieces."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)  # per token: {token id: entry with .logprob}
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Captured:
    """One answered request before it is made a `Completion`.

    `request` is vLLM's parsed body (has `model_dump`). `response` is the whole answer of a request that does not
    stream; `chunks` are the server-sent events of one that does, kept only where a parser reshapes the text.
    """

    id: str
    created_at: float
    model: str
    request: Any
    trace: Trace
    prompt_token_ids: list[int] = field(default_factory=list)
    choices: dict[int, ChoiceTape] = field(default_factory=dict)
    response: Any = None
    chunks: list[str] | None = None
    ttft_s: float | None = None
    duration_s: float | None = None
    finished: bool = False
    key_id: str = field(default_factory=lambda: current_caller.get().key_id)
    replaced: Mapping[str, Admitted] = field(default_factory=dict)  # pictures that went to the engine changed, by URL


class Tape:
    """Runs beside one request: `listen` passes the engine's outputs through and takes them down."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured

    async def listen(self, outputs: Any) -> AsyncGenerator[Any, None]:
        """The same outputs, in the same order, one by one."""
        try:
            async for output in outputs:
                self._take(output)
                yield output
        finally:
            if hasattr(outputs, "aclose"):
                await outputs.aclose()

    def end(self, response: Any = None) -> Captured | None:
        """The finished record; None when the engine gave nothing, for then there is no answer to keep."""
        captured = self.captured
        if not captured.choices:
            return None
        captured.duration_s = time.perf_counter() - captured.trace.began
        captured.response = response
        reasons = [choice.finish_reason for choice in captured.choices.values()]
        wanted = captured.request.n or 1
        captured.finished = len(reasons) >= wanted and not {None, "abort", "error"} & set(reasons)
        return captured

    def _take(self, output: Any) -> None:
        captured = self.captured
        if captured.ttft_s is None:
            captured.ttft_s = time.perf_counter() - captured.trace.began
        if output.prompt_token_ids is not None and not captured.prompt_token_ids:
            captured.prompt_token_ids = output.prompt_token_ids
        for part in output.outputs:
            choice = captured.choices.get(part.index)
            if choice is None:
                choice = captured.choices[part.index] = ChoiceTape(part.index)
            choice.token_ids.extend(part.token_ids)
            if part.logprobs is not None:
                choice.logprobs.extend(part.logprobs)
            choice.texts.append(part.text)
            choice.finish_reason = part.finish_reason or choice.finish_reason
