"""What operators do, written down: one line an action, through whichever wire it came.

Comes in: actions of the handlers, the current caller and wire. Goes out: rows in the store, and pages of them.
Must not import vllm, fastapi or grpc.

A line is written before the action is answered. Where that fails (the store took the action a moment before), the
action's own answer stands; the line goes to the log as an error, and is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from noria.access.audit import OK, AuditEvent, Noted, new_event, result_of
from noria.errors import NoriaError, NotFound
from noria.records import Json
from noria.store import Store
from serve.access.caller import current_caller, current_wire
from serve.access.roles import OPERATOR
from serve.api.schemas import AuditPage, listing, parse

log = logging.getLogger("noria.audit")


class Audit:
    """The server's audit log. `written` and `lost` count lines."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.written = 0
        self.lost = 0

    @asynccontextmanager
    async def action(self, name: str, target: str | None = None) -> AsyncIterator[Noted]:
        """Around an action: its line says how it ended, also where the caller left meanwhile."""
        noted, result = Noted(target), OK
        try:
            yield noted
        except BaseException as error:
            result = result_of(error)
            raise
        finally:
            await self.note(name, noted.target, result)

    async def note(self, action: str, target: str | None, result: str) -> None:
        """Writes a line of the current caller."""
        caller, wire = current_caller.get(), current_wire.get()
        if result == NotFound.code and not OPERATOR & caller.roles:  # or any client could fill the store
            return
        event = new_event(
            key_id=caller.key_id, name=caller.name, action=action, target=target, result=result, wire=wire
        )
        await asyncio.shield(asyncio.ensure_future(self._write(event)))

    async def list_events(self, query: Mapping[str, Any]) -> Json:
        """A page, newest first."""
        page = parse(AuditPage, query)
        rows = await asyncio.to_thread(
            self._store.list_audit_events,
            after=page.after,
            limit=page.limit + 1,
            order=page.order,
            key_id=page.key_id,
            action=page.action,
        )
        return listing([row.to_wire() for row in rows], page.limit)

    async def _write(self, event: AuditEvent) -> None:
        try:
            await asyncio.to_thread(self._store.add_audit_event, event)
        except NoriaError as error:
            self.lost += 1
            told = {"audit_id": event.id, "key_id": event.key_id, "action": event.action, "result": event.result}
            log.error("audit line lost", extra={**told, "reason": error.code})
        else:
            self.written += 1
