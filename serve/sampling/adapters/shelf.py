"""The policy adapters that are loaded beside the live version: put, leased, used, unloaded.

Comes in: uploads, and the clock. Goes out: `Adapter`s that a group may use while it runs. Nobody else learns of them:
they are not among vLLM's models, so that no `model=` of a user's request can name one. Must not import vllm.

A name belongs to its bytes: the same bytes under the same name are the same adapter, at any time; other bytes under a
name that was used before are refused for as long as the process lives. The engine never meets a name twice at all: it
gets one with a number that only grows, because keys and values of a prompt are kept under the adapter's name.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from noria.errors import Conflict, InvalidRequest, NotFound, Superseded
from noria.records import Json
from serve.engine.versions import ServingVersion, Trace, VersionGate
from serve.sampling.adapters.upload import receive
from serve.sampling.adapters.validate import Linears, check_adapter, linears_of
from serve.sampling.ports import LoadedAdapter, SamplingEngine

log = logging.getLogger("noria.sampling")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DEFAULT_TTL_S = 600.0
FIRST_NUMBER = 1_000_000  # far from the numbers that vLLM counts up for adapters of its own


def own_folder(home: Path) -> Path:
    """Where this process keeps adapters, empty. What processes of this machine left that live no more is removed."""
    shelf, host = home / "policy-adapters", os.uname().nodename
    for left in shelf.glob(f"{host}-*"):
        pid = left.name.removeprefix(f"{host}-")
        if pid.isdecimal() and not (_alive(int(pid)) and int(pid) != os.getpid()):
            shutil.rmtree(left, ignore_errors=True)
    return shelf / f"{host}-{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass
class Adapter:
    """A loaded adapter. `expires_at` is seconds since the epoch; `groups` run on it now."""

    name: str
    version: ServingVersion
    sha256: str
    rank: int
    loaded: LoadedAdapter
    ttl_s: float
    expires_at: float
    groups: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def fingerprint(self) -> str:
        """The version's, and which adapter on it: `v7-1a2b3c4d+step-12@9f8e7d6c`."""
        return f"{self.version.fingerprint}+{self.name}@{self.sha256[:8]}"

    def to_wire(self) -> Json:
        """As HTTP and gRPC show it."""
        return {
            "object": "adapter",
            "name": self.name,
            "version": self.version.id,
            "fingerprint": self.fingerprint,
            "sha256": self.sha256,
            "rank": self.rank,
            "ttl_s": self.ttl_s,
            "expires_at": self.expires_at,
            "groups": self.groups,
        }


class AdapterShelf:
    """At most `most` adapters, each of the version that is current, each with a lease."""

    def __init__(
        self,
        engine: SamplingEngine,
        gate: VersionGate,
        folder: Path,
        *,
        most: int,
        max_rank: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder` is this process's own, see `own_folder`. `most` 0 takes none."""
        self._engine, self._gate, self._folder = engine, gate, folder
        self.most, self.max_rank = most, max_rank
        self._clock = clock
        self._held: dict[str, Adapter] = {}
        self._used: dict[str, str] = {}  # every name that was ever loaded -> the hash of its bytes
        self._linears: dict[str, Linears] = {}
        self._numbers = itertools.count(FIRST_NUMBER)
        self._changing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    def held(self) -> list[Adapter]:
        """What is loaded, the oldest first."""
        return list(self._held.values())

    async def put(
        self, name: str, version: str, chunks: AsyncIterable[bytes], ttl_s: float = DEFAULT_TTL_S
    ) -> tuple[Adapter, bool]:
        """Loads an upload; False beside it where the very same adapter is loaded already, whose lease begins anew.

        Raises InvalidRequest for bytes that are no adapter, Conflict (codes `adapters_off`, `adapter_name_used`,
        `adapters_full`), Superseded when `version` is not the one that serves.
        """
        self._check_asked(name, version)
        folder = self._folder / f"incoming-{uuid.uuid4().hex}"
        await asyncio.to_thread(folder.mkdir, parents=True)
        try:
            linears = await self._expected(self._gate.current)
            sha256 = await receive(chunks, folder, linears.most_bytes(self.max_rank))
            async with self._changing:
                return await self._keep(name, version, sha256, folder, linears, ttl_s)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @asynccontextmanager
    async def use(self, name: str | None, version: ServingVersion) -> AsyncIterator[Adapter | None]:
        """The adapter for the time of one group, its lease renewed; None stands for the version itself.

        Raises NotFound (code `adapter_not_found`), Conflict where there are none, Superseded for one of another base.
        """
        if name is None:
            yield None
            return
        adapter = self._find(name)
        if adapter.version != version:
            raise Superseded(f"{name} was made for {adapter.version.id}, and {version.id} serves now", param="adapter")
        adapter.groups += 1
        adapter.idle.clear()
        self._renew(adapter)
        try:
            yield adapter
        finally:
            adapter.groups -= 1
            if not adapter.groups:
                adapter.idle.set()
            self._renew(adapter)

    async def drop(self, name: str) -> Json:
        """Unloads an adapter once no group runs on it any more; nobody finds it from now on. Raises NotFound."""
        adapter = self._find(name)
        del self._held[name]
        await self._unload(adapter)
        return {"object": "adapter.deleted", "name": name, "deleted": True}

    async def drop_all(self) -> None:
        """Unloads every adapter, those too whose deletion is under way: another version is about to serve, or nothing.

        vLLM reads adapters from their folders again after a reload, and ends the engine where one is gone.
        """
        for adapter in self.held():
            if self._held.pop(adapter.name, None) is not None:
                await self._unload(adapter)
        while self._leaving:
            await asyncio.wait(self._leaving)

    async def expire(self) -> None:
        """Unloads the adapters whose lease is over and on which nothing runs."""
        for adapter in self.held():
            if not adapter.groups and adapter.expires_at <= self._clock():
                if self._held.pop(adapter.name, None) is None:
                    continue
                log.info("adapter_expired", extra={"adapter": adapter.name, "model_version": adapter.version.id})
                await self._unload(adapter)

    async def close(self) -> None:
        """Unloads everything and removes the folder."""
        await self.drop_all()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _keep(
        self, name: str, version: str, sha256: str, folder: Path, linears: Linears, ttl_s: float
    ) -> tuple[Adapter, bool]:
        if self._used.get(name, sha256) != sha256:
            raise Conflict(
                f"{name} was used for other weights: give every update a name of its own",
                param="name",
                code="adapter_name_used",
            )
        there = self._held.get(name)
        if there is not None:
            there.ttl_s = ttl_s
            self._renew(there)
            return there, False
        rank = await asyncio.to_thread(check_adapter, folder, linears, self.max_rank)
        trace = Trace(request_id=f"adapter-{name}", streaming=True, background=True)
        current = await self._gate.admit(trace)  # no swap begins before it is loaded
        try:
            self._check_asked(name, version)
            return await self._load(name, current, sha256, folder, rank, ttl_s), True
        finally:
            self._gate.release(trace)

    async def _load(
        self, name: str, version: ServingVersion, sha256: str, folder: Path, rank: int, ttl_s: float
    ) -> Adapter:
        number = next(self._numbers)
        place = self._folder / f"{number}-{name}"
        await asyncio.to_thread(folder.rename, place)
        loaded = LoadedAdapter(number, f"noria-policy/{number}/{name}", place)
        try:
            await self._engine.load(loaded)
        except BaseException:  # whoever put it may have left, and the engine may have it by now
            with suppress(Exception):
                await self._engine.unload(loaded)
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
            raise
        adapter = Adapter(name, version, sha256, rank, loaded, ttl_s, self._clock() + ttl_s)
        self._held[name], self._used[name] = adapter, sha256
        log.info("adapter_loaded", extra={"adapter": name, "model_version": version.id, "rank": rank})
        return adapter

    async def _unload(self, adapter: Adapter) -> None:
        """To its end, also where whoever asked for it leaves: nobody would find the adapter again."""
        leaving = asyncio.create_task(self._let_go(adapter))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        await asyncio.shield(leaving)

    async def _let_go(self, adapter: Adapter) -> None:
        await adapter.idle.wait()
        try:
            await self._engine.unload(adapter.loaded)
        except Exception as error:  # a dead engine holds nothing, and a reload forgets every adapter anyway
            log.warning("adapter_unload_failed", extra={"adapter": adapter.name}, exc_info=error)
        await asyncio.to_thread(shutil.rmtree, adapter.loaded.path, ignore_errors=True)
        log.info("adapter_unloaded", extra={"adapter": adapter.name, "model_version": adapter.version.id})

    def _check_asked(self, name: str, version: str) -> None:
        if not self.most:
            raise Conflict(
                "this server takes no policy adapters: start it with engine.policy_adapters = 1 or more",
                param="engine.policy_adapters",
                code="adapters_off",
            )
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"name: {name!r} is not up to 128 letters, digits, '.', '_' and '-'", param="name")
        if version != self._gate.current.id:
            raise Superseded(f"the adapter was made for {version}, and {self._gate.current.id} serves", param="version")
        if name not in self._held and len(self._held) >= self.most:
            held = ", ".join(sorted(self._held))
            raise Conflict(
                f"{held} {'is' if len(self._held) == 1 else 'are'} loaded and engine.policy_adapters is {self.most}: "
                "delete one first, or let its lease end",
                param="engine.policy_adapters",
                code="adapters_full",
            )

    def _find(self, name: str) -> Adapter:
        adapter = self._held.get(name)
        if adapter is None:
            raise NotFound(
                f"no adapter {name!r} is loaded (never put, deleted, its lease over, or another version serves since)",
                param="adapter",
                code="adapter_not_found",
            )
        return adapter

    async def _expected(self, version: ServingVersion) -> Linears:
        if version.id not in self._linears:
            self._linears = {version.id: await asyncio.to_thread(linears_of, version.path)}
        return self._linears[version.id]

    def _renew(self, adapter: Adapter) -> None:
        adapter.expires_at = self._clock() + adapter.ttl_s
