"""API keys, their hashes alone.

Comes in: names and roles; ids. Goes out: `ApiKey` records, and a key's text once, when it is made or rotated.
No row is ever deleted: a store that has had a key keeps asking for one. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, or_, select, update

from noria.access.keys import ROLES, ApiKey, Role, hash_of, new_key_id, new_text
from noria.errors import Conflict, InvalidRequest, NotFound
from noria.store.access.tables import api_keys
from noria.store.completions import Part

RESERVED = ("settings", "local", "os")
LONGEST_NAME = 64


class KeyStore(Part):
    """The store's keys."""

    def create_key(self, name: str, roles: Sequence[str], expires_at: float | None = None) -> tuple[ApiKey, str]:
        """A new key and its text, which is kept nowhere.

        Raises InvalidRequest for a name or role that cannot be, Conflict where a key of that name is not revoked yet.
        """
        _check_name(name)
        made_id = new_key_id()
        text = new_text(made_id)
        key = ApiKey(made_id, name, known_roles(roles), hash_of(text), self._now(), expires_at=expires_at)
        if expires_at is not None and expires_at <= self._now():
            raise InvalidRequest("a key cannot expire before it is made", param="expires")
        with self._db.write() as conn:
            self._db.lock(conn, "keys")  # a name must not be taken twice at once
            same = select(api_keys.c.id).where(api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
            other = conn.execute(same).scalar()
            if other is not None:
                told = f"{other} is called {name!r} already: rotate it, revoke it, or choose another name"
                raise Conflict(told, param="name", code="name_taken")
            conn.execute(insert(api_keys), {**vars(key), "roles": list(key.roles)})
        return key, text

    def list_keys(self) -> list[ApiKey]:
        """Every key that ever was, oldest first."""
        with self._db.read() as conn:
            return [_key(row) for row in conn.execute(select(api_keys).order_by(api_keys.c.seq))]

    def has_keys(self) -> bool:
        """Whether a key was ever made, valid or not."""
        with self._db.read() as conn:
            return conn.execute(select(api_keys.c.id).limit(1)).first() is not None

    def get_key(self, key: str) -> ApiKey:
        """The key of that id, or the newest of that name. Raises NotFound."""
        with self._db.read() as conn:
            return _find(conn, key)

    def rotate_key(self, key: str, overlap_s: float = 0.0) -> tuple[ApiKey, str]:
        """Gives the key another secret; the one before is taken for `overlap_s` seconds more.

        Raises NotFound, Conflict for a key that is revoked or has expired.
        """
        if overlap_s < 0:
            raise InvalidRequest("the overlap cannot be negative", param="overlap")
        with self._db.write() as conn:
            self._db.lock(conn, "keys")
            found, now = _find(conn, key), self._now()
            if found.state(now) != "valid":
                raise Conflict(f"{found.id} is {found.state(now)}: make another key", code=f"key_{found.state(now)}")
            text = new_text(found.id)
            before = (found.hash, now + overlap_s) if overlap_s else (None, None)
            changes = {"hash": hash_of(text), "previous_hash": before[0], "previous_until": before[1]}
            return _change(conn, found.id, changes), text

    def revoke_key(self, key: str) -> ApiKey:
        """Ends the key for good; again is no error. Raises NotFound."""
        with self._db.write() as conn:
            found = _find(conn, key)
            if found.revoked_at is not None:
                return found
            return _change(conn, found.id, {"revoked_at": self._now(), "previous_hash": None, "previous_until": None})

    def keys_used(self, used: Mapping[str, float]) -> None:
        """Remembers when keys were last used; an earlier time than the one that is there changes nothing."""
        with self._db.write() as conn:
            for id_, at in sorted(used.items()):
                earlier = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < at)
                conn.execute(update(api_keys).where(api_keys.c.id == id_, earlier).values(last_used_at=at))


def known_roles(roles: Sequence[str]) -> tuple[Role, ...]:
    """The roles, each once and in their order. Raises InvalidRequest for one there is not, and for none."""
    for role in roles:
        if role not in ROLES:
            raise InvalidRequest(f"there is no role {role!r}; the roles are {', '.join(ROLES)}", param="roles")
    if not roles:
        raise InvalidRequest(f"a key needs a role: {', '.join(ROLES)}", param="roles")
    return tuple(role for role in ROLES if role in roles)


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable() or name.startswith("key_"):
        told = f"a key's name has 1 to {LONGEST_NAME} printable characters and does not begin with key_"
        raise InvalidRequest(told, param="name")
    if name in RESERVED:
        raise InvalidRequest(f"{name!r} stands for a caller without a key of the store: choose another", param="name")


def _find(conn: Connection, key: str) -> ApiKey:
    by = api_keys.c.id == key if key.startswith("key_") else api_keys.c.name == key
    row = conn.execute(select(api_keys).where(by).order_by(api_keys.c.seq.desc()).limit(1)).first()
    if row is None:
        raise NotFound(f"there is no key {key!r}; `noria keys list` has them", param="key")
    return _key(row)


def _change(conn: Connection, id_: str, changes: Mapping[str, Any]) -> ApiKey:
    conn.execute(update(api_keys).where(api_keys.c.id == id_).values(**changes))
    return _find(conn, id_)


def _key(row: Any) -> ApiKey:
    values = {name: value for name, value in row._mapping.items() if name != "seq"}
    return ApiKey(**{**values, "roles": tuple(row.roles)})
