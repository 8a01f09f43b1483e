"""Several sampling engines as one: prompts go where there is room; a dead address is skipped, its prompts asked again.

Comes in: addresses, adapters, prompts. Goes out: groups, in the order in which they come. Blocking, with threads of its
own; may be used from one thread at a time.

Each address has as many threads as groups may be under way there; they all take from one queue, so that a quick engine
gets more prompts than a slow one. An address that does not answer gives its prompt back to the queue's head and is
left alone for a while that doubles; then it is tried again, and the adapter is put there again where it is missing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from noria.errors import Conflict, InvalidRequest, NoriaError, NotFound, Superseded, Unavailable, UnsupportedModel
from noria.records import Json
from noria.sampling.places import Place, place_at
from noria.sampling.records import Drawing, Group, group_of
from noria.tls import Trust

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
GIVE_UP_S = 300.0
TTL_S = 600.0
LOOK_S = 0.05
ADAPTER_GONE, FULL = "adapter_not_found", "adapters_full"


@dataclass(frozen=True)
class Held:
    """An adapter that the pool keeps on its addresses; the folder has to stay until `delete_adapter`."""

    name: str
    folder: Path
    version: str
    ttl_s: float


class Member:
    """One address and how it fares. `asked_again` counts prompts that it took and did not answer.

    `left` are the names of adapters that it could not be told to delete.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.failures = 0
        self.asked_again = 0
        self.error: NoriaError | None = None
        self.left: set[str] = set()
        self.lock = threading.Lock()
        self.putting = threading.Lock()
        self._until = 0.0

    @property
    def rests(self) -> bool:
        """Whether it is left alone now."""
        return time.monotonic() < self._until

    def worked(self) -> None:
        """It answered."""
        with self.lock:
            self.failures, self.error, self._until = 0, None, 0.0

    def begun(self) -> None:
        """Another run begins: what it said of another version may be over by now."""
        if isinstance(self.error, Superseded):
            self.worked()

    def failed(self, error: NoriaError) -> None:
        """It did not; threads that fail together count once."""
        with self.lock:
            if self.error is None or not self.rests:
                self.failures += 1
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self.failures - 1))
                self._until = time.monotonic() + pause_s
            self.error = error


class SamplingPool:
    """Samples groups from one or more engines; use it as a context manager or close it."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        api_key: str | None = None,
        concurrency: int = 4,
        timeout_s: float = 600.0,
        give_up_s: float = GIVE_UP_S,
        trust: Trust | None = None,
        connect: Callable[[str], Place] | None = None,
    ) -> None:
        """`concurrency` groups are under way at each address at once; `timeout_s` bounds one of them.

        When no address has answered for `give_up_s`, sampling raises. `trust` is for https and grpcs. Raises
        InvalidRequest for a wrong address, SettingsError for files of `trust` that cannot be used.
        """
        if not addresses:
            raise InvalidRequest("name at least one sampling address", param="addresses")
        at = connect or (lambda address: place_at(address, api_key=api_key, timeout_s=timeout_s, trust=trust))
        self.members = [Member(at(address)) for address in dict.fromkeys(addresses)]
        self._concurrency, self._give_up_s = concurrency, give_up_s
        self._adapters: dict[str, Held] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. Adapters stay until they are deleted or their lease ends."""
        for member in self.members:
            member.place.close()

    def version(self) -> str:
        """The version that serves, as the first address that answers says. Raises Unavailable when none does."""
        for member in self.members:
            try:
                return str(member.place.list_adapters()["version"])
            except Unavailable as error:
                member.failed(error)
        raise self._nobody()

    def put_adapter(self, name: str, folder: Path, version: str, *, ttl_s: float = TTL_S) -> None:
        """Loads peft's adapter at every address.

        `version` is the one it was trained beside. An address that does not answer, or holds as many adapters as it
        may, gets it later. Raises what an address refuses it for (Superseded, and Conflict `adapters_full`, only where
        none takes it), Unavailable when none answers.
        """
        self._adapters[name] = Held(name, folder, version, ttl_s)
        try:
            outcomes = self._everywhere(lambda member: self._put(member, name))
        except BaseException:
            del self._adapters[name]
            raise
        if not [member for member, error in outcomes if error is None]:
            del self._adapters[name]
            said = [error for _, error in outcomes if isinstance(error, (Superseded, Conflict))]
            raise said[0] if said else self._nobody()

    def delete_adapter(self, name: str) -> None:
        """Unloads it everywhere; where nobody answers, before the next one is put there, or when its lease ends."""
        self._adapters.pop(name, None)
        outcomes = self._everywhere(lambda member: member.place.delete_adapter(name), missing=True)
        for member, error in outcomes:
            if error is not None:
                member.left.add(name)

    def list_adapters(self) -> list[str]:
        """The names of those that are loaded anywhere, whoever put them. Raises Unavailable when nobody answers."""
        names: set[str] = set()

        def look(member: Member) -> None:
            names.update(one["name"] for one in member.place.list_adapters()["data"])

        outcomes = self._everywhere(look)
        if all(error is not None for _, error in outcomes):
            raise self._nobody()
        return sorted(names)

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """A group a prompt, as they come; `Group.prompt` tells which. Prompts are taken as they are needed.

        Each prompt is a conversation in OpenAI's messages. With `version`, only that version may answer. Raises
        Superseded when every address serves another one, Unavailable when none has answered for `give_up_s`, and what
        an address refuses for another reason; a refused prompt is a group with an `error`.
        """
        yield from _Run(self, prompts, drawing, adapter, version).groups()

    def _put(self, member: Member, name: str) -> None:
        held = self._adapters.get(name)
        for left in sorted(member.left):
            with suppress(NotFound):
                member.place.delete_adapter(left)
            member.left.discard(left)
        if held is not None:
            member.place.put_adapter(held.name, held.version, held.ttl_s, held.folder)

    def _put_again(self, member: Member, name: str, why: NotFound) -> None:
        """Where an address came back without it. Raises `why` for an adapter that is not the pool's."""
        held = self._adapters.get(name)
        if held is None:
            raise why
        with member.putting:  # one thread puts it, the others find it there
            if name not in [one["name"] for one in member.place.list_adapters()["data"]]:
                self._put(member, name)

    def _everywhere(
        self, call: Callable[[Member], object], *, missing: bool = False
    ) -> list[tuple[Member, NoriaError | None]]:
        """Calls every address at once. What may pass (`_passes`) is told, other errors are raised."""

        def one(member: Member) -> tuple[Member, NoriaError | None]:
            try:
                call(member)
            except NotFound:
                if not missing:
                    raise
            except NoriaError as error:
                if not _passes(error):
                    raise
                member.failed(error)
                return member, error
            member.worked()
            return member, None

        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(one, self.members))

    def _nobody(self) -> Unavailable:
        told = "; ".join(str(member.error) for member in self.members if member.error is not None)
        return Unavailable(f"no sampling address answers: {told}", code="no_sampling_engine")


class _Run:
    """One call of `SamplingPool.sample`: its queue, its threads, its results."""

    def __init__(
        self,
        pool: SamplingPool,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        adapter: str | None,
        version: str | None,
    ) -> None:
        self._pool = pool
        self._fields = {**drawing.body(), "adapter": adapter, "version": version}
        self._adapter = adapter
        self._prompts = enumerate(prompts)
        self._back: deque[tuple[int, Sequence[Json]]] = deque()
        self._results: queue.Queue[Group | BaseException] = queue.Queue(maxsize=64)
        self._lock = threading.Lock()
        self._open = 0
        self._dry = self._over = False
        self._answered = time.monotonic()

    def groups(self) -> Iterator[Group]:
        """Starts the threads, gives what they find, ends them."""
        threads = [
            threading.Thread(target=self._work, args=(member,), name=f"sampling {member.place.address}", daemon=True)
            for member in self._pool.members
            for _ in range(self._pool._concurrency)
        ]
        for member in self._pool.members:
            member.begun()
        for thread in threads:
            thread.start()
        try:
            while not self._finished():
                try:
                    result = self._results.get(timeout=LOOK_S)
                except queue.Empty:
                    self._give_up()
                    continue
                if isinstance(result, BaseException):
                    raise result
                with self._lock:
                    self._open -= 1
                yield result
        finally:
            self._over = True

    def _finished(self) -> bool:
        with self._lock:
            return self._dry and not self._open

    def _give_up(self) -> None:
        """Raises where going on is without hope."""
        errors = [member.error for member in self._pool.members]
        old = [error for error in errors if isinstance(error, Superseded)]
        if len(old) == len(errors) and min(member.failures for member in self._pool.members) > 1:
            raise old[0]  # twice: the first may tell of a swap that was given up
        if None not in errors and time.monotonic() - self._answered > self._pool._give_up_s:
            raise old[0] if old else self._pool._nobody()

    def _work(self, member: Member) -> None:
        while not self._over:
            try:
                taken = None if member.rests else self._take()
                if taken is not None:
                    self._serve(member, *taken)
                elif self._finished():
                    return
                else:
                    time.sleep(LOOK_S)
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                self._hand_over(error)
                return

    def _serve(self, member: Member, prompt: int, messages: Sequence[Json]) -> None:
        try:
            self._hand_over(self._ask(member, prompt, messages))
        except NoriaError as error:
            if not _passes(error):
                raise
            member.failed(error)
            with self._lock:
                member.asked_again += 1
                self._back.appendleft((prompt, messages))

    def _take(self) -> tuple[int, Sequence[Json]] | None:
        with self._lock:
            if self._back:
                return self._back.popleft()
            try:
                taken = None if self._dry else next(self._prompts, None)
            except BaseException:  # of the caller's own iterable; nobody is done before it is handed over
                self._open += 1
                raise
            if taken is None:
                self._dry = True
            else:
                self._open += 1
            return taken

    def _hand_over(self, result: Group | BaseException) -> None:
        while not self._over:
            try:
                self._results.put(result, timeout=LOOK_S)
                return
            except queue.Full:
                continue

    def _ask(self, member: Member, prompt: int, messages: Sequence[Json]) -> Group:
        body = {**self._fields, "messages": list(messages)}
        try:
            try:
                said = member.place.sample(body)
            except NotFound as error:
                if error.code != ADAPTER_GONE or self._adapter is None:
                    raise
                self._pool._put_again(member, self._adapter, error)
                said = member.place.sample(body)
        except (InvalidRequest, UnsupportedModel) as error:
            return Group(prompt, tuple(messages), member.place.address, error=error.message)
        member.worked()
        self._answered = time.monotonic()
        return group_of(prompt, messages, member.place.address, said)


def _passes(error: NoriaError) -> bool:
    """Whether the address may do the same later, and another one now."""
    return isinstance(error, (Unavailable, Superseded)) or (isinstance(error, Conflict) and error.code == FULL)
