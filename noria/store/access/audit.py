"""What operators did, line by line.

Comes in: `AuditEvent` values. Goes out: the same, in pages. There is no way to change or delete one here.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from sqlalchemy import insert, select

from noria.access.audit import AuditEvent
from noria.errors import NotFound
from noria.store.access.tables import audit_events
from noria.store.completions import Order, Part


class AuditStore(Part):
    """The store's audit log."""

    def add_audit_event(self, event: AuditEvent) -> None:
        """Adds one."""
        with self._db.write() as conn:
            conn.execute(insert(audit_events), vars(event))

    def list_audit_events(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        key_id: str | None = None,
        action: str | None = None,
    ) -> list[AuditEvent]:
        """A page, newest first unless told. Raises NotFound where `after` is unknown."""
        seq = audit_events.c.seq
        query = select(audit_events).order_by(seq.desc() if order == "desc" else seq.asc()).limit(limit)
        if key_id is not None:
            query = query.where(audit_events.c.key_id == key_id)
        if action is not None:
            query = query.where(audit_events.c.action == action)
        with self._db.read() as conn:
            if after is not None:
                at = conn.execute(select(seq).where(audit_events.c.id == after)).scalar()
                if at is None:
                    raise NotFound(f"no audit event {after!r}", param="after")
                query = query.where(seq < at if order == "desc" else seq > at)
            rows = conn.execute(query)
            return [AuditEvent(**{k: v for k, v in row._mapping.items() if k != "seq"}) for row in rows]
