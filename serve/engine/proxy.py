"""vLLM's engine as the OpenAI handlers see it: the same, but every generation passes the version gate.

Comes in: calls to `AsyncLLM.generate`, with the caller's `Trace` in `current_trace`. Goes out: the engine's outputs,
unchanged. Swaps, probes and shutdown use the raw engine. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from serve.access.limits.load import Meter, current_ticket
from serve.engine.versions import Trace, VersionGate, current_trace


class _Stay:
    """One generation's time inside the gate; it ends once, whoever ends it first."""

    def __init__(self, gate: VersionGate, trace: Trace) -> None:
        self._gate, self._trace = gate, trace
        self._inside = True
        self.begun = False  # the engine has given an output, so it knows the request

    def leave(self) -> None:
        """Gives the admission back, the first time it is called."""
        if self._inside:
            self._inside = False
            self._gate.release(self._trace)


class EngineProxy:
    """Stands in for an `AsyncLLM`: everything is the engine's own, but `generate` is admitted at the gate first.

    A stay ends with the engine's last output, with the generator, or, while a swap waits, as soon as the engine has
    ended a request whose reader has not taken the last tokens yet: a slow reader never holds a swap up.
    """

    def __init__(self, engine: Any, gate: VersionGate, *, keep_priority: bool = False) -> None:
        """Unless `keep_priority`, every request has vLLM's default priority, whatever its body or header says.

        vLLM schedules by priority here so that sampling stays below users; without that it ignores the field, and
        a client must not be able to pass the others by because of it.
        """
        self._engine = engine
        self._gate = gate
        self._keep_priority = keep_priority
        self._stays: dict[str, _Stay] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        gate.on_drain(self._sweep)

    def __getattr__(self, name: str) -> Any:
        """Whatever is not gated is the engine's own."""
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As `AsyncLLM.generate`, but it begins when the gate lets the request in."""
        if not self._keep_priority:
            options.pop("priority", None)
        trace = current_trace.get()
        if trace is None:  # a caller without a door of its own: the generation is the request
            trace = Trace(request_id=request_id, streaming=True)
        with Meter(current_ticket.get(), sampling_params) as meter:
            try:
                await self._gate.admit(trace)
            except asyncio.CancelledError:
                task = asyncio.create_task(self._deliver(prompt, sampling_params, request_id, options))
                self._deliveries.add(task)
                task.add_done_callback(self._deliveries.discard)
                raise
            stay = self._stays[request_id] = _Stay(self._gate, trace)
            if trace.logprobs and sampling_params.logprobs is None:
                sampling_params.logprobs = 0  # the chosen token's, and no others
            outputs = self._engine.generate(prompt, sampling_params, request_id, **options)
            if meter.at_end_only:
                outputs = self._watched(outputs, meter, prompt, request_id)
            try:
                async for output in outputs:
                    meter.take(output)
                    stay.begun = True
                    if output.finished:
                        stay.leave()
                    yield output
            except (asyncio.CancelledError, GeneratorExit):
                self._break_off(meter, prompt, request_id)
                raise
            finally:
                try:
                    await outputs.aclose()  # tells the engine to abort, where it has not ended
                finally:
                    stay.leave()
                    if self._stays.get(request_id) is stay:
                        del self._stays[request_id]

    async def _watched(
        self, outputs: AsyncGenerator[Any, None], meter: Meter, prompt: Any, request_id: str
    ) -> AsyncGenerator[Any, None]:
        """The outputs of a request that gives all at its end: what it made is counted when its client leaves before.

        vLLM forgets the request as soon as the cancellation reaches it, so that must not reach it first.
        """
        try:
            while True:
                pending = asyncio.ensure_future(anext(outputs, None))
                try:
                    await asyncio.wait({pending})
                except asyncio.CancelledError:
                    self._break_off(meter, prompt, request_id)
                    pending.cancel()
                    await asyncio.gather(pending, return_exceptions=True)
                    raise
                output = pending.result()
                if output is None:
                    return
                yield output
        finally:
            await outputs.aclose()

    def _break_off(self, meter: Meter, prompt: Any, request_id: str) -> None:
        if meter.counts:
            meter.broken_off(prompt, generated(self._engine.output_processor, request_id))

    async def _deliver(self, prompt: Any, sampling_params: Any, request_id: str, options: dict[str, Any]) -> None:
        """Hands the engine a request whose client left while it waited at the gate, and takes it back at once.

        vLLM keeps processed images in two halves that mirror each other (0.31). Ours has this request's images by now;
        were the engine not to see them, every later request with one of them would end with an error.
        """
        with contextlib.suppress(Exception):  # nobody waits for it, and a dead engine has no cache
            await self._engine.add_request(request_id, prompt, sampling_params, **options)
            await self._engine.abort(request_id)

    def _sweep(self) -> None:
        running = self._engine.output_processor.external_req_ids
        for request_id, stay in self._stays.items():
            if stay.begun and not running.get(request_id):
                stay.leave()


def generated(processor: Any, request_id: str) -> int:
    """How many tokens vLLM's output processor (0.31) holds of a request that still runs; 0 where it knows none."""
    ids = processor.external_req_ids.get(request_id, ())
    states = [processor.request_states[one] for one in ids if one in processor.request_states]
    running = sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)
    parents = {id(state.parent_req): state.parent_req for state in states if state.parent_req is not None}
    ended = (part for parent in parents.values() for part in parent.output_aggregator if part is not None)
    return int(running + sum(len(part.token_ids) for part in ended))
