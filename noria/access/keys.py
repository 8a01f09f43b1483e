"""API keys: their roles, their text, their hash.

Comes in: nothing secret but what `new_secret` draws. Goes out: `ApiKey` records and the text of a key, which is shown
once and never kept. Must not import the store or serve.

A key's text is `noria-ID-SECRET`: 16 hexadecimal digits that name it and 64 that are 256 random bits. Only the SHA-256
of the whole text is kept. A slow password hash would add nothing: it protects secrets that people choose and that
can be guessed; nobody tries 2**256 secrets, and a slow hash on every request would be a way to stall the server.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import typing
from dataclasses import dataclass
from typing import Literal

from noria.records import Json

Role = Literal["client", "annotator", "operator", "trainer"]
ROLES: tuple[Role, ...] = typing.get_args(Role)
TEXT = re.compile(r"noria-([0-9a-f]{16})-([0-9a-f]{64})")
MEANT = re.compile(r"noria-([0-9a-f]{16})-")
NO_HASH = hashlib.sha256(b"no key has this hash").hexdigest()


@dataclass(frozen=True)
class ApiKey:
    """One key as the store has it. Times are seconds since the epoch; None where it has not come to that.

    `previous_hash` is that of the secret before the last rotation, which is taken until `previous_until`.
    """

    id: str
    name: str
    roles: tuple[Role, ...]
    hash: str
    created_at: float
    last_used_at: float | None = None
    expires_at: float | None = None
    revoked_at: float | None = None
    previous_hash: str | None = None
    previous_until: float | None = None

    def state(self, now: float) -> Literal["valid", "expired", "revoked"]:
        """Whether it opens anything."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"

    def to_wire(self, now: float) -> Json:
        """What may be shown of it: everything but the hashes."""
        shown = ("id", "name", "created_at", "last_used_at", "expires_at", "revoked_at", "previous_until")
        fields = {name: getattr(self, name) for name in shown}
        return {**fields, "object": "key", "roles": list(self.roles), "state": self.state(now)}


def new_key_id() -> str:
    """`key_` and 16 hexadecimal digits."""
    return "key_" + secrets.token_hex(8)


def new_text(id_: str) -> str:
    """A new secret for the key, as its holder sends it."""
    return f"noria-{id_.removeprefix('key_')}-{secrets.token_hex(32)}"


def hash_of(text: str) -> str:
    """SHA-256 (hex) of a key's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def id_in(text: str) -> str | None:
    """The id that a key's text names; None where the text is not of that form."""
    found = TEXT.fullmatch(text)
    return f"key_{found[1]}" if found else None


def id_meant(text: str) -> str | None:
    """The id in what somebody wrote for a key's text, whole or not; None where it looks like none. Proves nothing."""
    found = MEANT.search(text)
    return f"key_{found[1]}" if found else None
