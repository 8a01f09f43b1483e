"""Who makes the call that is being answered.

Comes in: what the door found out from the key. Goes out: a `Caller`, current in the call's task. Must not import vllm.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from noria.access.audit import AuditWire
from noria.access.keys import ROLES, Role

__all__ = ["LOCAL", "Caller", "Role", "current_caller", "current_wire"]


@dataclass(frozen=True)
class Caller:
    """The key that was shown: its id (never the key itself), its name, its roles.

    Without any key configured everybody is `LOCAL`.
    """

    key_id: str
    name: str
    roles: frozenset[Role]


LOCAL = Caller("local", "local", frozenset(ROLES))
"""The caller of a server that asks for no key."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=LOCAL)
"""The caller of the call that runs in this task; set by the HTTP middleware and by the gRPC interceptor."""

current_wire: ContextVar[AuditWire] = ContextVar("current_wire", default="http")
"""The wire on which it came; set with the caller."""
