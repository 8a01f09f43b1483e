"""How much one key may use, and how much work may wait at the server's door.

Comes in: a tree. Goes out: a frozen section, and from it the `KeyRules` of one caller. Must not import serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from noria.module_settings import Section

Limit = Annotated[int, Field(ge=1)] | Literal["none"]
RoleName = Literal["client", "annotator", "operator", "trainer"]


@dataclass(frozen=True)
class KeyRules:
    """What holds for one caller; None is without limit."""

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    preferences_per_hour: int | None = None


RULES = tuple(one.name for one in fields(KeyRules))


class KeyLimits(Section):
    """Limits of one key, or of every key with one role. What is left out is as for every key; `"none"` lifts it."""

    requests_per_minute: Limit | None = None
    """See limits.requests_per_minute."""
    concurrent_requests: Limit | None = None
    """See limits.concurrent_requests."""
    tokens_per_day: Limit | None = None
    """See limits.tokens_per_day."""
    preferences_per_hour: Limit | None = None
    """See limits.preferences_per_hour."""


class LimitSettings(Section):
    """What each key may use, and what the server lets wait; docs/limits.md. Without any key everybody is one caller,
    `local`."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Requests to the engine that a key may make within any 60 seconds; none is any number."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Requests to the engine that a key may have running or waiting at once; none is any number."""
    tokens_per_day: int | None = Field(None, ge=1)
    """Prompt and completion tokens that a key may use in a day (UTC); none is any number."""
    preferences_per_hour: int | None = Field(None, ge=1)
    """Preferences and feedback that a key may record within any hour, over restarts too; none is any number."""
    roles: dict[RoleName, KeyLimits] = Field(default_factory=dict)
    """The same for a role: `[limits.roles.operator]`, `requests_per_minute = "none"`. Of several roles the most
    generous counts."""
    keys: dict[str, KeyLimits] = Field(default_factory=dict)
    """The same for the key of that name; it wins over its roles."""
    waiting: int | None = Field(None, ge=1)
    """Requests that may wait for the engine, over both wires; past it 503. None is 16 times the sequences that the
    engine runs at once."""
    body_bytes_in_flight: int = Field(512 * 2**20, ge=2**20)
    """Bytes of request bodies that the server holds at once; past it 503."""

    def rules_of(self, name: str, roles: Iterable[str]) -> KeyRules:
        """What holds for the key of that name: its own words, else the best of its roles, else every key's."""
        by_role: Mapping[str, KeyLimits] = {str(role): limits for role, limits in self.roles.items()}
        own, known = self.keys.get(name), [by_role.get(role) for role in roles]
        return KeyRules(**{rule: self._value(rule, own, known) for rule in RULES})

    def _value(self, rule: str, own: KeyLimits | None, roles: list[KeyLimits | None]) -> int | None:
        everybody: int | None = getattr(self, rule)
        said = getattr(own, rule, None)
        if said is not None:
            return _number(said)
        values = [getattr(role, rule, None) for role in roles]
        numbers = [everybody if value is None else _number(value) for value in values] or [everybody]
        return None if None in numbers else max(number for number in numbers if number is not None)


def _number(limit: Limit) -> int | None:
    return None if limit == "none" else int(limit)
