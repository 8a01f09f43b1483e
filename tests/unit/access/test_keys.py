"""The server's keys in memory: looked up anew, closed when the store is away, never open again."""

from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from noria.access.keys import ApiKey, hash_of, new_key_id, new_text
from noria.errors import Forbidden, NoriaError, Unauthenticated, Unavailable
from noria.settings import ServerSettings
from serve.access import keys as module
from serve.access.caller import LOCAL
from serve.access.keys import Access
from serve.access.roles import ANY, CLIENT, OPERATOR, SAMPLE
from tests.unit.store.conftest import Clock


class Source:
    """Keys in a list, which may be away, or hang."""

    def __init__(self) -> None:
        self.keys: list[ApiKey] = []
        self.error: Exception | None = None
        self.looks = 0
        self.used: list[Mapping[str, float]] = []
        self.going_on = threading.Event()
        self.going_on.set()

    def add(self, *roles: Any, **more: Any) -> str:
        """Another key; its text."""
        id_ = new_key_id()
        text = new_text(id_)
        self.keys.append(ApiKey(id_, f"key {len(self.keys)}", roles, hash_of(text), 0.0, **more))
        return text

    def list_keys(self) -> list[ApiKey]:
        """The keys."""
        self.looks += 1
        self.going_on.wait(10)
        if self.error is not None:
            raise self.error
        return list(self.keys)

    def keys_used(self, used: Mapping[str, float]) -> None:
        """Notes it."""
        self.used.append(used)


def bearer(text: str) -> str:
    return f"Bearer {text}"


async def refused(access: Access, header: str | None, roles: Any = ANY) -> NoriaError:
    with pytest.raises(NoriaError) as told:
        await access.admit(header, roles)
    return told.value


async def test_without_any_key_everybody_is_local() -> None:
    access = Access(Source(), ServerSettings())
    for header in (None, "Bearer demo", "Basic x"):
        assert await access.admit(header, OPERATOR) is LOCAL
    await access.close()


async def test_a_key_opens_what_its_roles_open() -> None:
    source = Source()
    text = source.add("client", "trainer")
    access = Access(source, ServerSettings())
    caller = await access.admit(bearer(text), CLIENT)
    assert (caller.key_id, caller.name) == (source.keys[0].id, "key 0")
    assert sorted(caller.roles) == ["client", "trainer"]
    assert (await access.admit(f"bEaReR  {text} ", SAMPLE)).key_id == source.keys[0].id
    forbidden = await refused(access, bearer(text), OPERATOR)
    assert isinstance(forbidden, Forbidden)
    assert forbidden.message == "This call needs the role operator; the key 'key 0' has client, trainer."
    other = new_text(source.keys[0].id)
    for header in (None, "", "Bearer ", text, f"Basic {text}", bearer(text[:-1]), bearer(other), "Bearer \udcff"):
        error = await refused(access, header)
        assert (type(error), error.code) == (Unauthenticated, "invalid_api_key")
    assert vars(access.refusals) == {"unauthenticated": 8, "forbidden": 1, "unavailable": 0}
    await access.close()


async def test_as_many_hashes_are_compared_for_a_key_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    text = source.add("client")
    access = Access(source, ServerSettings(api_key="fixed", trainer_key="drawn"))
    await access.load()
    compared: list[tuple[int, int]] = []

    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr("serve.access.keys.hmac.compare_digest", counting)
    seen = []
    for header in (bearer(text), bearer(new_text("key_" + "0" * 16)), "Bearer nonsense", "Bearer fixed", None):
        compared.clear()
        with suppress(Unauthenticated):
            await access.authenticate(header)
        seen.append(list(compared))
    assert seen == [[(64, 64)] * 4] * 5
    await access.close()


async def test_expiry_revocation_and_the_overlap_of_a_rotation(clock: Clock) -> None:
    source = Source()
    short, old = source.add("client", expires_at=1_010.0), source.add("client")
    new = new_text(source.keys[1].id)
    source.keys[1] = replace(source.keys[1], hash=hash_of(new), previous_hash=hash_of(old), previous_until=1_005.0)
    access = Access(source, ServerSettings(), clock=clock, refresh_s=0.0)
    for text in (short, old, new):
        assert (await access.admit(bearer(text), CLIENT)).roles == {"client"}
    clock.now = 1_005.0
    assert (await refused(access, bearer(old))).code == "invalid_api_key"
    clock.now = 1_010.0
    assert (await refused(access, bearer(short))).code == "key_expired"
    source.keys[1] = replace(source.keys[1], revoked_at=1_010.0)
    assert (await refused(access, bearer(new))).code == "key_revoked"
    await access.close()


async def test_the_settings_keys_stay_beside_those_of_the_store() -> None:
    source = Source()
    source.add("client")
    access = Access(source, ServerSettings(api_key="fixed", trainer_key="drawn"))
    assert (await access.admit("Bearer fixed", OPERATOR)).name == "settings"
    assert (await access.admit("Bearer drawn", SAMPLE)).key_id == "trainer"
    assert isinstance(await refused(access, "Bearer drawn", CLIENT), Forbidden)
    source.error = Unavailable("gone")
    access._looked_at = 0.0
    assert (await access.admit("Bearer fixed", OPERATOR)).key_id == "settings"  # it needs no store
    await access.close()


async def test_an_empty_key_in_the_settings_is_none() -> None:
    source = Source()
    access = Access(source, ServerSettings(api_key="", trainer_key=""), refresh_s=0.0)
    assert await access.admit(None, OPERATOR) is LOCAL
    source.add("client")
    for header in (None, "Bearer ", "Bearer"):
        assert isinstance(await refused(access, header), Unauthenticated)
    await access.close()


async def test_a_trainer_key_alone_does_not_make_the_server_ask() -> None:
    access = Access(Source(), ServerSettings(trainer_key="drawn"))
    assert await access.admit(None, OPERATOR) is LOCAL
    await access.close()


async def test_a_first_key_shuts_the_door_and_an_emptied_store_does_not_open_it() -> None:
    source = Source()
    access = Access(source, ServerSettings(), refresh_s=0.0)
    assert await access.admit(None, OPERATOR) is LOCAL
    text = source.add("client")
    assert isinstance(await refused(access, None), Unauthenticated)
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    source.keys.clear()
    for header in (None, bearer(text)):
        assert isinstance(await refused(access, header), Unauthenticated)
    await access.close()


@pytest.mark.parametrize("error", [Unavailable("gone"), RuntimeError("a bug")])
async def test_a_store_that_is_away_shuts_the_door_of_a_server_with_keys(error: Exception) -> None:
    source = Source()
    text = source.add("client")
    access = Access(source, ServerSettings(), refresh_s=0.0)
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    source.error = error
    for header in (bearer(text), bearer(new_text("key_" + "0" * 16)), None):
        told = await refused(access, header)
        assert (type(told), told.code) == (Unavailable, "keys_unavailable")
    source.error = None
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    assert access.refusals.unavailable == 3
    await access.close()


async def test_a_server_that_never_had_a_key_answers_without_its_store() -> None:
    source = Source()
    access = Access(source, ServerSettings(), refresh_s=0.0)
    await access.load()
    source.error = Unavailable("gone")
    assert await access.admit(None, OPERATOR) is LOCAL
    with pytest.raises(Unavailable):
        await access.load()
    await access.close()


async def test_a_store_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    source = Source()
    text = source.add("client")
    access = Access(source, ServerSettings(), refresh_s=0.0)
    await access.load()
    source.going_on.clear()
    first = [asyncio.create_task(refused(access, bearer(text))) for _ in range(50)]
    assert {(await one).code for one in first} == {"keys_unavailable"}
    assert (await refused(access, bearer(text))).code == "keys_unavailable"
    assert source.looks == 2  # all fifty and the one after them asked for the same
    source.going_on.set()
    assert access._look is not None
    await access._look
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    await access.close()


async def test_the_keys_are_looked_up_once_a_second_and_uses_written_once_a_minute(clock: Clock) -> None:
    source = Source()
    text = source.add("client")
    access = Access(source, ServerSettings(), clock=clock, refresh_s=3600.0)
    for _ in range(100):
        await access.admit(bearer(text), CLIENT)
    clock.now += 59
    await access.admit(bearer(text), CLIENT)
    clock.now += 1
    await access.admit(bearer(text), CLIENT)
    await access.close()
    assert source.looks == 1
    assert source.used == [{source.keys[0].id: 1_000.0}, {source.keys[0].id: 1_060.0}]


async def test_keys_are_looked_up_beside_the_traffic_and_not_believed_for_long() -> None:
    source = Source()
    text = source.add("client")
    access = Access(source, ServerSettings(), refresh_s=1000.0)
    await access.load()
    source.going_on.clear()
    access._looked_at -= 1500.0  # due, and not too old yet: nobody waits
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    source.error = Unavailable("gone")
    source.going_on.set()
    assert access._look is not None
    await asyncio.wait([access._look])
    assert (await access.admit(bearer(text), CLIENT)).name == "key 0"
    access._looked_at -= 500.0
    assert (await refused(access, bearer(text))).code == "keys_unavailable"
    await access.close()


@pytest.fixture
def clock() -> Clock:
    """A clock at 1000."""
    return Clock()
