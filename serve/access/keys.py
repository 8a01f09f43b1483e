"""Who is calling: the keys that the server knows, held in memory and looked up anew each second.

Comes in: the store, the settings, an `Authorization` header. Goes out: a `Caller`, or the error to refuse with.
Must not import vllm, fastapi or grpc.

Fails closed: once a key is known to exist, none passes unless the store said within the last two seconds what the keys
are. A server that never had a key answers as before when its store is away: there is nothing to be found out.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from pydantic import SecretStr

from noria.access.keys import NO_HASH, ROLES, ApiKey, hash_of, id_in
from noria.errors import Forbidden, NoriaError, Unauthenticated, Unavailable
from noria.settings import ServerSettings
from serve.access.caller import LOCAL, Caller, Role
from serve.access.roles import Roles

log = logging.getLogger("noria.access")
REFRESH_S = 1.0
PATIENCE_S = 2.0  # for the store's word on keys, before a call is refused with 503
USED_EVERY_S = 60.0
MISSING = "The API key is missing or wrong: send it as `Authorization: Bearer KEY` (commands read NORIA_API_KEY)."


class KeySource(Protocol):
    """What is needed of the store."""

    def list_keys(self) -> list[ApiKey]:
        """Every key that ever was."""
        ...

    def keys_used(self, used: Mapping[str, float]) -> None:
        """Remembers when keys were used."""
        ...


@dataclass
class Refusals:
    """How many calls were not let in, by reason."""

    unauthenticated: int = 0
    forbidden: int = 0
    unavailable: int = 0


class Access:
    """The server's keys. Both doors ask the same one."""

    def __init__(
        self,
        store: KeySource,
        settings: ServerSettings,
        *,
        clock: Callable[[], float] = time.time,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._store, self._clock, self._refresh_s = store, clock, refresh_s
        fixed = ((settings.api_key, SETTINGS), (settings.trainer_key, OUR_TRAINER))
        self._fixed = [(_hash(secret), caller) for secret, caller in fixed if secret]
        self._keys: dict[str, ApiKey] = {}
        self.keyed = bool(settings.api_key)
        self._looked_at = float("-inf")
        self._look: asyncio.Task[None] | None = None
        self._look_began = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="access")  # a full pool must not shut the door
        self._used: dict[str, float] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self.refusals = Refusals()

    async def admit(self, header: str | None, roles: Roles) -> Caller:
        """The caller that an `Authorization` header proves, who has one of the roles.

        Raises Unauthenticated, Forbidden, and Unavailable where the store does not say what the keys are.
        """
        try:
            caller = await self.authenticate(header)
            if not caller.roles & roles:
                raise _forbidden(caller, roles)
        except NoriaError as error:
            self._count(error)
            raise
        return caller

    async def authenticate(self, header: str | None) -> Caller:
        """The caller, whatever it may do. Raises Unauthenticated, Unavailable."""
        fresh = await self._fresh()
        if not self.keyed:
            return LOCAL
        scheme, _, text = (header or "").partition(" ")
        shown = text.strip() if scheme.lower() == "bearer" else ""
        digest = hash_of(shown)
        fixed = [caller for known, caller in self._fixed if hmac.compare_digest(known, digest)]
        key = self._match(id_in(shown), digest)
        if fixed:
            return fixed[0]
        if fresh is not None:
            raise fresh
        if key is None:
            raise Unauthenticated(MISSING)
        state = key.state(self._clock())
        if state != "valid":
            told = "has expired" if state == "expired" else "was revoked"
            raise Unauthenticated(f"This API key {told}: ask an operator for another one.", code=f"key_{state}")
        self._note_use(key.id)
        return Caller(key.id, key.name, frozenset(key.roles))

    async def load(self) -> None:
        """Looks the keys up now. Raises Unavailable."""
        error = await self._fresh()
        if error is not None:
            raise error

    async def close(self) -> None:
        """Waits for what is being written."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _match(self, id_: str | None, digest: str) -> ApiKey | None:
        """The key of that id if the hash is its own; as many comparisons are made where there is no such key."""
        key = self._keys.get(id_ or "")
        now = self._clock()
        current = key.hash if key is not None else NO_HASH
        previous = key.previous_hash if key is not None else None
        overlapping = key is not None and (key.previous_until or 0.0) > now
        is_current = hmac.compare_digest(current, digest)
        is_previous = hmac.compare_digest(previous or NO_HASH, digest)
        return key if is_current or (is_previous and overlapping) else None

    async def _fresh(self) -> Unavailable | None:
        """Makes sure that the keys are new enough; the error where that cannot be, and matters.

        From `refresh_s` on they are looked up beside the traffic; only calls after twice that wait for it.
        """
        age_s = time.monotonic() - self._looked_at
        if age_s < self._refresh_s:
            return None
        if self._look is None or self._look.done():
            self._look, self._look_began = asyncio.create_task(self._look_up()), time.monotonic()
            self._look.add_done_callback(_told)
        if age_s < 2 * self._refresh_s:
            return None
        left_s = PATIENCE_S - (time.monotonic() - self._look_began)  # of a store that hangs only the first must wait
        try:
            await asyncio.wait_for(asyncio.shield(self._look), max(0.0, left_s))
        except Exception:  # noqa: BLE001  whatever it is, the door stays shut; `_told` has told it
            return Unavailable("the store does not say which keys there are; try again", code="keys_unavailable")
        return None

    async def _look_up(self) -> None:
        began = time.monotonic()
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._store.list_keys)
        self._keys = {key.id: key for key in found}
        self.keyed = self.keyed or bool(found)  # never back: a store that was emptied must not open the door
        self._looked_at = began

    def _note_use(self, id_: str) -> None:
        now = self._clock()
        if now - self._used.get(id_, float("-inf")) < USED_EVERY_S:
            return
        self._used[id_] = now
        task = asyncio.create_task(self._write_use(id_, now))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write_use(self, id_: str, at: float) -> None:
        try:
            await asyncio.to_thread(self._store.keys_used, {id_: at})
        except NoriaError as error:
            log.warning("last use not kept", extra={"key_id": id_, "reason": error.code})

    def _count(self, error: NoriaError) -> None:
        if isinstance(error, Unauthenticated):
            self.refusals.unauthenticated += 1
        elif isinstance(error, Forbidden):
            self.refusals.forbidden += 1
        else:
            self.refusals.unavailable += 1


SETTINGS = Caller("settings", "settings", frozenset(ROLES))
"""Who shows `server.api_key`."""

OUR_TRAINER = Caller("trainer", "the trainer of `noria up`", frozenset[Role]({"trainer"}))
"""Who shows `server.trainer_key`."""


def _told(look: asyncio.Task[None]) -> None:
    error = None if look.cancelled() else look.exception()
    if error is not None:
        log.warning("the keys could not be looked up", extra={"reason": type(error).__name__})


def _hash(secret: SecretStr) -> str:
    return hash_of(secret.get_secret_value())


def _forbidden(caller: Caller, roles: Roles) -> Forbidden:
    has, needs = ", ".join(sorted(caller.roles)), " or ".join(sorted(roles))
    return Forbidden(f"This call needs the role {needs}; the key {caller.name!r} has {has}.")
