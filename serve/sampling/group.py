"""One group: the samples of one prompt, from its admission at the gate to its answer.

Comes in: a prompt, how to draw, an adapter or none. Goes out: every sample's token ids and log-probabilities, or the
reason for which the group was ended. Must not import vllm.

A sample that is set back for users' sake is aborted in the engine and goes on later from the tokens it has said: the
prompt's own ids with those behind them, never a text that is tokenised again. A group's samples all come from one
version; a swap ends the group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from noria.errors import InvalidRequest, NoriaError, Unavailable
from noria.records import Json
from serve.sampling.adapters.shelf import Adapter
from serve.sampling.ports import Draw, Piece, Prepared, SamplingEngine
from serve.sampling.turns import Turn, Turns

TRIES = 2  # a sample that the engine fails is begun again once, with the prompt prepared anew


@dataclass
class Sample:
    """One sample as it grows. `turns` counts its times in the engine."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    turns: int = 0
    failures: int = 0

    def take(self, piece: Piece) -> None:
        """Appends what the engine gave; a sample that the engine aborted is not finished."""
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        if piece.finish_reason != "abort":
            self.finish_reason = piece.finish_reason


class Group:
    """n samples of one prompt. `end` may be called at any time, and again; `run` then raises what it was given."""

    def __init__(
        self, id_: str, engine: SamplingEngine, turns: Turns, adapter: Adapter | None, draw: Draw, n: int
    ) -> None:
        self.id, self.adapter, self.draw = id_, adapter, draw
        self.samples = [Sample(index) for index in range(n)]
        self._engine, self._turns = engine, turns
        self._why: NoriaError | None = None
        self._running: set[str] = set()
        self._queued: set[asyncio.Task[None]] = set()
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def tokens(self) -> int:
        """Tokens that its samples have said."""
        return sum(len(sample.token_ids) for sample in self.samples)

    async def run(self, messages: Sequence[Json]) -> Prepared:
        """Fills the samples; returns the prompt as the engine took it. Raises why there is no group."""
        prepared = await self._engine.prepare(messages)
        self._check()
        room = self._engine.context_tokens - len(prepared.prompt_token_ids)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prepared.prompt_token_ids)} tokens and the engine's context is "
                f"{self._engine.context_tokens}: no token of an answer fits",
                param="messages",
            )
        self.draw = replace(self.draw, max_tokens=min(self.draw.max_tokens, room))
        tasks = [asyncio.create_task(self._draw(sample, prepared, messages)) for sample in self.samples]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await self._settle(tasks)
        errors = [error for error in (task.exception() for task in tasks if not task.cancelled()) if error is not None]
        for error in (one for one in errors if not isinstance(one, NoriaError)):
            raise error
        self._check()
        for error in errors:
            raise error
        return prepared

    def end(self, why: NoriaError) -> None:
        """Ends the group: those that wait at once, those in the engine as soon as it has let them go."""
        self._why = self._why or why
        for task in self._queued:
            task.cancel()
        self._queued = set()
        for request_id in self._running:
            self._abort(request_id)

    async def _draw(self, sample: Sample, prepared: Prepared, messages: Sequence[Json]) -> None:
        task, again = asyncio.current_task(), False
        if task is None:
            raise RuntimeError("a sample runs in a task of its own")
        while sample.finish_reason is None:
            self._check()
            self._queued.add(task)  # may be cancelled from here on: the engine does not know the sample now
            async with self._turns.turn(again=again) as turn:
                self._queued.discard(task)
                again = True
                self._check()
                try:
                    await self._turn(turn, sample, prepared)
                except NoriaError as error:
                    prepared = await self._again(sample, error, messages)

    async def _turn(self, turn: Turn, sample: Sample, prepared: Prepared) -> None:
        if turn.stopped:
            return
        request_id = f"{self.id}-{sample.index}-{sample.turns}"
        sample.turns += 1
        draw = replace(self.draw, max_tokens=self.draw.max_tokens - len(sample.token_ids))
        if draw.seed is not None:
            draw = replace(draw, seed=draw.seed + sample.index + 10_007 * (sample.turns - 1))
        said, adapter = tuple(sample.token_ids), self.adapter
        pieces = self._engine.sample(prepared, said, draw, request_id, adapter.loaded if adapter else None)
        self._running.add(request_id)
        turn.on_stop(lambda: self._abort(request_id))
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    sample.take(piece)
                    if (turn.stopped or self._why) and piece.finish_reason is None:
                        self._abort(request_id)  # it was asked for before the engine knew the request
                    elif piece.finish_reason == "abort" and not (turn.stopped or self._why):
                        raise Unavailable("the engine let the sample go; ask for the group again")
        finally:
            self._running.discard(request_id)

    async def _again(self, sample: Sample, error: NoriaError, messages: Sequence[Json]) -> Prepared:
        """The prompt for another try; what vLLM kept of its pictures may be what went wrong. Raises the error."""
        self._check()
        sample.failures += 1
        if sample.failures >= TRIES or not isinstance(error, Unavailable):
            raise error
        return await self._engine.prepare(messages)

    def _check(self) -> None:
        if self._why is not None:
            raise self._why

    def _abort(self, request_id: str) -> None:
        task = asyncio.create_task(self._engine.abort(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _settle(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Where a failure or a cancellation left samples behind, none stays in the engine."""
        if not all(task.done() for task in tasks):
            failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
            whys = [error for error in failed if isinstance(error, NoriaError)]
            self.end(whys[0] if whys else Unavailable("the group was given up"))
            await asyncio.gather(*tasks, return_exceptions=True)
