"""One line of the audit log, and the lines of those who act on the store without a server.

Comes in: who, what, on which. Goes out: `AuditEvent`; rows, through whatever has `add_audit_event`.
Must not import the store or serve.
"""

from __future__ import annotations

import getpass
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from noria.errors import NoriaError
from noria.records import Json

AuditWire = Literal["http", "grpc", "cli"]
OK = "ok"
LONGEST = 200  # characters kept of a target: some of them are what a caller wrote


@dataclass(frozen=True)
class AuditEvent:
    """Somebody did something: `result` is `ok`, or the code of the error it ended with.

    `key_id` is the key's id, `settings`, `local` (a server that asks for no key) or `os` (the command line, straight
    on the store; `name` is then the user's).
    """

    id: str
    at: float
    key_id: str
    name: str
    action: str
    target: str | None
    result: str
    wire: AuditWire

    def to_wire(self) -> Json:
        """The event as both wires have it."""
        return {"object": "audit_event", **asdict(self)}


class AuditSink(Protocol):
    """Where events go: the store."""

    def add_audit_event(self, event: AuditEvent) -> None:
        """Keeps it, durable on return."""
        ...


def new_event(*, key_id: str, name: str, action: str, target: str | None, result: str, wire: AuditWire) -> AuditEvent:
    """An event of now; a target that is too long is cut."""
    cut = None if target is None else target[:LONGEST]
    return AuditEvent("audit_" + secrets.token_hex(12), time.time(), key_id, name, action, cut, result, wire)


class Noted:
    """What is known of an action while it runs; its `target` may be told before its end."""

    def __init__(self, target: str | None = None) -> None:
        self.target = target


@contextmanager
def by_os_user(sink: AuditSink, action: str, target: str | None = None) -> Iterator[Noted]:
    """Around what the command line does to the store itself: one line, whether it went well or not."""
    noted, result = Noted(target), OK
    try:
        yield noted
    except BaseException as error:
        result = result_of(error)
        raise
    finally:
        told = new_event(key_id="os", name=os_user(), action=action, target=noted.target, result=result, wire="cli")
        sink.add_audit_event(told)


def result_of(error: BaseException) -> str:
    """The word for how an action failed."""
    if isinstance(error, NoriaError):
        return error.code
    return "internal_error" if isinstance(error, Exception) else "interrupted"


def os_user() -> str:
    """The user this process runs as; its number where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
