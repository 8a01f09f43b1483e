"""The handlers of sampling that both wires call: adapters are put and deleted, groups are sampled.

Comes in: bodies as dicts, uploads in pieces. Goes out: wire dicts, or a NoriaError. Must not import vllm, fastapi or
grpc.

Nothing here is a user's: groups are not captured, do not count as requests in flight, and give way (see `turns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from noria.errors import NoriaError, NotFound, Superseded, Unavailable, UnsupportedModel
from noria.records import Json
from serve.access.audit import Audit
from serve.api.schemas import AdapterQuery, SampleBody, parse
from serve.engine.versions import ServingVersion, Trace, VersionGate, current_trace
from serve.sampling.adapters.shelf import Adapter, AdapterShelf
from serve.sampling.group import Group
from serve.sampling.ports import Draw, SamplingEngine
from serve.sampling.turns import Turns

log = logging.getLogger("noria.sampling")
EXPIRE_S = 1.0
CLOSE_S = 10.0


@dataclass
class Counts:
    """What happened so far; groups = done + ended + refused + running ones. `tokens` are also those of ended groups."""

    groups: int = 0
    done: int = 0
    ended: int = 0
    refused: int = 0
    samples: int = 0
    tokens: int = 0
    adapters: int = 0


class Sampling:
    """One engine's sampling. `keep` is to run beside the server, `close` to be waited for at its end."""

    def __init__(
        self, engine: SamplingEngine, gate: VersionGate, shelf: AdapterShelf, turns: Turns, audit: Audit
    ) -> None:
        self._engine, self._gate, self.shelf, self.turns, self._audit = engine, gate, shelf, turns, audit
        self.counts = Counts()
        self._groups: set[Group] = set()
        self._works: set[asyncio.Task[Json]] = set()
        self._closing = False
        gate.on_users(turns.users)
        gate.on_drain(self._give_way_to_a_swap)

    @property
    def tokens(self) -> int:
        """Tokens sampled so far, those of groups that still run too."""
        return self.counts.tokens + sum(group.tokens for group in self._groups)

    async def put_adapter(self, query: Mapping[str, Any], chunks: AsyncIterable[bytes]) -> tuple[Json, bool]:
        """Loads an adapter; True beside it where that was new. Raises as `AdapterShelf.put`."""
        asked = parse(AdapterQuery, query)
        async with self._audit.action("put_adapter", asked.name):
            adapter, created = await self.shelf.put(asked.name, asked.version, chunks, asked.ttl_s)
        self.counts.adapters += created
        return adapter.to_wire(), created

    async def delete_adapter(self, name: str) -> Json:
        """Unloads an adapter; groups that run on it are ended. Raises NotFound."""
        async with self._audit.action("delete_adapter", name):
            for group in list(self._groups):
                if group.adapter is not None and group.adapter.name == name:
                    group.end(NotFound(f"{name} was deleted", param="adapter", code="adapter_not_found"))
            return await self.shelf.drop(name)

    async def list_adapters(self) -> Json:
        """What is loaded, how much fits, and which version it has to be made for."""
        return {
            "object": "list",
            "data": [adapter.to_wire() for adapter in self.shelf.held()],
            "version": self._gate.current.id,
            "most": self.shelf.most,
            "max_rank": self.shelf.max_rank,
        }

    async def sample(self, body: Mapping[str, Any]) -> Json:
        """A group of samples. A caller who leaves ends it.

        Raises InvalidRequest, NotFound (the adapter), Superseded when another version comes to serve meanwhile.
        """
        asked = parse(SampleBody, body)
        if asked.temperature not in (0.0, 1.0) and not self._engine.tempered:
            raise UnsupportedModel(
                "this engine gives log-probabilities at temperature 1 only: sample at temperature 1 (or 0)",
                param="temperature",
            )
        self.counts.groups += 1
        group = _Slot()
        work = asyncio.create_task(self._sample(asked, group, current_trace.get()))
        self._works.add(work)
        work.add_done_callback(self._works.discard)
        work.add_done_callback(_look_at)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            group.end(Unavailable("the caller left"))
            raise

    async def keep(self) -> None:
        """Ends leases until it is cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            await self.shelf.expire()

    async def forget_adapters(self) -> None:
        """Unloads every adapter; called before a swap, the gate closed and empty."""
        await self.shelf.drop_all()

    async def close(self) -> None:
        """Ends every group and unloads every adapter."""
        self._closing = True
        self._end_all(Unavailable("the server is shutting down: try again"))
        if self._works:
            _, late = await asyncio.wait(self._works, timeout=CLOSE_S)
            for work in late:  # they wait at a gate that no swap opens any more
                work.cancel()
        await self.shelf.close()

    async def _sample(self, asked: SampleBody, slot: _Slot, door: Trace | None) -> Json:
        try:
            async with self._admitted(asked) as version, self.shelf.use(asked.adapter, version) as adapter:
                if door is not None:
                    door.version = version  # the door names it in the answer's header
                id_ = f"sample-{uuid.uuid4().hex}"
                draw = Draw(asked.temperature, asked.top_p, max(0, asked.top_k), asked.max_tokens, asked.seed)
                group = Group(id_, self._engine, self.turns, adapter, draw, asked.n)
                self._groups.add(group)
                slot.fill(group)
                try:
                    answer = await self._answer(group, asked, version)
                finally:
                    self._groups.discard(group)
                    self.counts.tokens += group.tokens
            self.counts.done += 1
            return answer
        except BaseException as error:  # a bug and a cancellation are ends too
            refused = isinstance(error, NoriaError) and not isinstance(error, (Superseded, Unavailable))
            self.counts.refused += refused
            self.counts.ended += not refused
            raise

    @contextlib.asynccontextmanager
    async def _admitted(self, asked: SampleBody) -> AsyncIterator[ServingVersion]:
        trace = Trace(request_id="sample", streaming=True, background=True)
        version = await self._gate.admit(trace)
        try:
            if self._closing:
                raise Unavailable("the server is shutting down: try again")
            if asked.version not in (None, version.id):
                raise Superseded(f"{version.id} serves, not {asked.version}", param="version")
            yield version
        finally:
            self._gate.release(trace)

    async def _answer(self, group: Group, asked: SampleBody, version: ServingVersion) -> Json:
        created = time.time()
        prepared = await group.run(asked.messages)
        samples = [
            {
                "index": one.index,
                "text": self._engine.decode(one.token_ids),
                "token_ids": one.token_ids,
                "logprobs": one.logprobs,
                "finish_reason": one.finish_reason,
                "turns": one.turns,
            }
            for one in group.samples
        ]
        self.counts.samples += len(samples)
        adapter = group.adapter
        return {
            "id": group.id,
            "object": "sample_group",
            "created": created,
            "version": version.id,
            "fingerprint": _fingerprint(version, adapter),
            "adapter": adapter.name if adapter else None,
            "prompt_token_ids": list(prepared.prompt_token_ids),
            "logprobs_temperature": self._logprobs_temperature(asked.temperature),
            "samples": samples,
        }

    def _logprobs_temperature(self, temperature: float) -> float:
        return temperature if temperature and self._engine.tempered else 1.0

    def _give_way_to_a_swap(self) -> None:
        self._end_all(Superseded("another version is about to serve; its samples would not be this group's"))

    def _end_all(self, why: NoriaError) -> None:
        for group in list(self._groups):
            group.end(why)


class _Slot:
    """Where a group will be, so that it can be ended before it is there."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._why: NoriaError | None = None

    def fill(self, group: Group) -> None:
        self._group = group
        if self._why is not None:
            group.end(self._why)

    def end(self, why: NoriaError) -> None:
        self._why = why
        if self._group is not None:
            self._group.end(why)


def _fingerprint(version: ServingVersion, adapter: Adapter | None) -> str:
    return adapter.fingerprint if adapter else version.fingerprint


def _look_at(work: asyncio.Task[Json]) -> None:
    """Takes note of an error that nobody waits for any more: the caller has left."""
    if not work.cancelled():
        work.exception()
