"""Sampling from the servers that are there now: one that was started again may have another address.

Comes in: a way to find addresses, a way to open a pool over some. Goes out: a `Sampler`. Must not import torch or
`serve`.

A pool has the addresses that it was opened with. Where the operator names none, servers are those that beat in the
store; when these are others than before, a new pool is opened over them, and the adapter put there again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from noria.errors import Unavailable
from noria.records import Json
from noria.sampling.records import Drawing, Group
from noria.settings import Settings
from noria.store import Store
from train.methods.grpo.sampling.protocol import Sampler

FRESH_S = 15.0


class Pool(Sampler, Protocol):
    """A sampler with connections."""

    def close(self) -> None:
        """Closes them."""
        ...


class Servers:
    """A sampler over what `find` gives; use it as a context manager, for one thread at a time."""

    def __init__(self, find: Callable[[], Sequence[str]], connect: Callable[[Sequence[str]], Pool]) -> None:
        self._find = find
        self._connect = connect
        self._addresses: tuple[str, ...] = ()
        self._pool: Pool | None = None
        self._held: dict[str, tuple[Path, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def version(self) -> str:
        """The version that serves."""
        return self._now().version()

    def put_adapter(self, name: str, folder: Path, version: str) -> None:
        """Loads it everywhere, and again wherever a server turns up."""
        self._now().put_adapter(name, folder, version)
        self._held[name] = (folder, version)

    def delete_adapter(self, name: str) -> None:
        """Unloads it."""
        self._held.pop(name, None)
        self._now().delete_adapter(name)

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """As the pool does."""
        yield from self._now().sample(prompts, drawing, adapter=adapter, version=version)

    def _now(self) -> Pool:
        """The pool over today's addresses. Raises Unavailable where there is none."""
        found = tuple(self._find())
        if not found and self._pool is None:
            raise Unavailable("no server is up; start one with `noria up` or `noria serve`", code="no_sampling_engine")
        if self._pool is None or (found and found != self._addresses):
            self._close()
            pool = self._connect(found)
            try:
                for name, (folder, version) in self._held.items():
                    pool.put_adapter(name, folder, version)
            except BaseException:
                pool.close()
                raise
            self._pool, self._addresses = pool, found
        return self._pool

    def _close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def addresses(named: Sequence[str], settings: Settings, store: Store) -> Callable[[], Sequence[str]]:
    """Where to look: the addresses that are named, else `url` where it is set, else the servers that beat in the store.

    These are asked over gRPC, where pictures travel as bytes.
    """
    fixed = tuple(named) or ((settings.url,) if settings.url else ())
    if fixed:
        return lambda: fixed

    def beating() -> Sequence[str]:
        found = [one.info for one in store.processes("server", fresh_s=FRESH_S) if one.info.get("grpc")]
        secure = [str(info.get("url")).startswith("https:") for info in found]
        return sorted(f"grpc{'s' if tls else ''}://{info['grpc']}" for info, tls in zip(found, secure, strict=True))

    return beating


def key_of(named: Sequence[str], settings: Settings) -> str | None:
    """The key to show to those servers: the operator's, else what `noria up` drew for us and the server beside us.

    That one is never shown to a server that somebody named: it would learn a secret of ours, and not know it.
    """
    drawn = None if named or settings.url else settings.server.trainer_key
    return settings.shown_key or (drawn.get_secret_value() if drawn else None)
