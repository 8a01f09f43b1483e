"""Versions, which of them is live, rollouts, and the processes that are up.

Comes in: what registry, releaser and daemons report. Goes out: `Version`, `Rollout` and `ProcessInfo` values.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from noria.errors import Conflict, InvalidRequest, NotFound
from noria.records import Json, ProcessInfo, Rollout, RolloutState, Version, VersionState
from noria.store.completions import Part
from noria.store.tables import markers, processes, rollouts, versions

OPEN = ("queued", "running")


class VersionStore(Part):
    """The store's versions. The manifest in a version's folder is the truth; this is what can be asked quickly."""

    def add_version(self, version: Version, manifest_sha256: str | None = None) -> None:
        """Adds a version; one that is there already stays as it is."""
        with self._db.write() as conn:
            row = {**vars(version), "manifest_sha256": manifest_sha256}
            conn.execute(self._db.insert_new(versions), [row])

    def get_version(self, id_: str) -> Version:
        """One version. Raises NotFound."""
        with self._db.read() as conn:
            return _version(_version_row(conn, id_))

    def list_versions(self) -> list[Version]:
        """Every version, oldest first."""
        with self._db.read() as conn:
            return [_version(row) for row in conn.execute(select(versions).order_by(versions.c.seq))]

    def manifest_sha256(self, id_: str) -> str | None:
        """The sha256 of the version's manifest.json when it was published. Raises NotFound."""
        with self._db.read() as conn:
            found: str | None = _version_row(conn, id_).manifest_sha256
            return found

    def live(self) -> str | None:
        """The version new traffic gets."""
        with self._db.read() as conn:
            return _marker(conn, "live")

    def previous(self) -> str | None:
        """The version that was live before."""
        with self._db.read() as conn:
            return _marker(conn, "previous")

    def promote(self, version: str, rollout_id: str | None = None) -> None:
        """Makes a version live and, in the same transaction, ends the rollout that brought it.

        Raises NotFound for an unknown version or rollout, Conflict for a rejected version.
        """
        with self._db.write() as conn:
            self._db.lock(conn, "live")
            _promote(conn, version)
            if rollout_id is not None:
                done = {"state": "succeeded", "finished_at": self._now()}
                if not _update_rollout(conn, rollout_id, done):
                    raise _no_rollout(rollout_id)

    def rollback(self) -> str:
        """Makes the previous version live again; returns it. Raises Conflict when there is none."""
        with self._db.write() as conn:
            self._db.lock(conn, "live")
            back = _marker(conn, "previous")
            if back is None:
                raise Conflict("no version was live before: nothing to roll back to", code="no_previous")
            _promote(conn, back)
            return back

    def set_version_state(self, id_: str, state: VersionState) -> None:
        """Marks a version, for example as rejected. `live` is set by promote only; the live one keeps its mark."""
        with self._db.write() as conn:
            self._db.lock(conn, "live")
            _version_row(conn, id_)
            if (state == "live") != (_marker(conn, "live") == id_):
                raise Conflict(f"{id_} cannot be marked {state}: only a promotion changes what is live", param="state")
            _set_state(conn, id_, state)


class RolloutStore(Part):
    """The store's rollouts: at most one is open."""

    def create_rollout(
        self, version: str, strategy: Literal["direct", "canary"] = "direct", percent: int | None = None
    ) -> Rollout:
        """Queues a rollout. Raises NotFound for an unknown version, Conflict if it is rejected or one is under way."""
        with self._db.write() as conn:
            self._db.lock(conn, "rollouts")
            if _version_row(conn, version).state == "rejected":
                raise Conflict(f"{version} was rejected and cannot go live", param="version", code="version_rejected")
            under_way = conn.execute(select(rollouts).where(rollouts.c.state.in_(OPEN))).first()
            if under_way is not None:
                message = f"rollout {under_way.id} of {under_way.version} is {under_way.state}: wait until it ends"
                raise Conflict(message, code="rollout_under_way")
            made = Rollout(
                id="roll_" + secrets.token_hex(12),
                version=version,
                previous=_marker(conn, "live"),
                strategy=strategy,
                state="queued",
                created_at=self._now(),
                percent=percent,
            )
            conn.execute(insert(rollouts), vars(made))
        return made

    def claim_rollout(self, owner: str) -> Rollout | None:
        """The oldest queued rollout, now running; None if there is none or one runs."""
        with self._db.read() as conn:  # asked twice a second: do not begin a write for nothing
            if conn.execute(select(rollouts.c.id).where(rollouts.c.state == "queued")).first() is None:
                return None
        with self._db.write() as conn:
            self._db.lock(conn, "rollouts")
            if conn.execute(select(rollouts.c.id).where(rollouts.c.state == "running")).first() is not None:
                return None
            waiting = select(rollouts).where(rollouts.c.state == "queued").order_by(rollouts.c.seq).limit(1)
            row = conn.execute(waiting).first()
            if row is None:
                return None
            _update_rollout(conn, row.id, {"state": "running", "owner": owner})
            return _rollout_by_id(conn, row.id)

    def finish_rollout(
        self, id_: str, state: RolloutState, reason: str | None = None, metrics: Json | None = None
    ) -> Rollout:
        """Ends a rollout as succeeded or failed, or adds metrics to one that promote has ended. Raises NotFound."""
        if state in OPEN:
            raise InvalidRequest(f"a rollout cannot end as {state!r}", param="state")
        with self._db.write() as conn:
            self._db.lock(conn, "rollouts")
            old = _rollout_by_id(conn, id_)
            changes = {
                "state": state,
                "reason": reason,
                "metrics": {**old.metrics, **(metrics or {})},
                "finished_at": self._now() if old.finished_at is None else old.finished_at,
            }
            _update_rollout(conn, id_, changes)
            return _rollout_by_id(conn, id_)

    def get_rollout(self, id_: str) -> Rollout:
        """One rollout. Raises NotFound."""
        with self._db.read() as conn:
            return _rollout_by_id(conn, id_)

    def list_rollouts(self, limit: int = 20) -> list[Rollout]:
        """The newest rollouts first."""
        with self._db.read() as conn:
            rows = conn.execute(select(rollouts).order_by(rollouts.c.seq.desc()).limit(limit))
            return [_rollout(row) for row in rows]

    def requeue_running_rollouts(self) -> int:
        """Queues again what a server that died was doing; for a server that starts. Returns how many."""
        with self._db.write() as conn:
            self._db.lock(conn, "rollouts")
            again = update(rollouts).where(rollouts.c.state == "running").values(state="queued", owner=None)
            return conn.execute(again).rowcount


class ProcessStore(Part):
    """Heartbeats of servers and trainers."""

    def beat(self, info: ProcessInfo) -> None:
        """Stores a heartbeat over the last one of that id."""
        with self._db.write() as conn:
            conn.execute(self._db.upsert(processes, "id", ("kind", "heartbeat_at", "info")), [vars(info)])

    def forget_process(self, id_: str) -> None:
        """Takes a process that stops in order off the list."""
        with self._db.write() as conn:
            conn.execute(processes.delete().where(processes.c.id == id_))

    def processes(self, kind: Literal["server", "trainer"], fresh_s: float = 15) -> list[ProcessInfo]:
        """The processes of a kind that were heard of within `fresh_s` seconds, freshest first."""
        since = self._now() - fresh_s
        query = select(processes).where(processes.c.kind == kind, processes.c.heartbeat_at >= since)
        with self._db.read() as conn:
            rows = conn.execute(query.order_by(processes.c.heartbeat_at.desc()))
            return [ProcessInfo(**row._mapping) for row in rows]


def _promote(conn: Connection, version: str) -> None:
    if _version_row(conn, version).state == "rejected":
        raise Conflict(f"{version} was rejected and cannot go live", param="version", code="version_rejected")
    old = _marker(conn, "live")
    if old == version:
        return
    if old is not None:
        _set_state(conn, old, "retired")
    _set_state(conn, version, "live")
    for key, value in (("previous", old), ("live", version)):
        conn.execute(update(markers).where(markers.c.key == key).values(value=value))


def _marker(conn: Connection, key: str) -> str | None:
    return conn.execute(select(markers.c.value).where(markers.c.key == key)).scalar()


def _set_state(conn: Connection, id_: str, state: VersionState) -> None:
    conn.execute(update(versions).where(versions.c.id == id_).values(state=state))


def _version_row(conn: Connection, id_: str) -> Any:
    row = conn.execute(select(versions).where(versions.c.id == id_)).first()
    if row is None:
        raise NotFound(f"no version {id_!r}", param="version")
    return row


def _version(row: Any) -> Version:
    return Version(**{key: value for key, value in row._mapping.items() if key not in ("seq", "manifest_sha256")})


def _update_rollout(conn: Connection, id_: str, changes: Json) -> int:
    return conn.execute(update(rollouts).where(rollouts.c.id == id_).values(**changes)).rowcount


def _rollout_by_id(conn: Connection, id_: str) -> Rollout:
    row = conn.execute(select(rollouts).where(rollouts.c.id == id_)).first()
    if row is None:
        raise _no_rollout(id_)
    return _rollout(row)


def _rollout(row: Any) -> Rollout:
    return Rollout(**{key: value for key, value in row._mapping.items() if key not in ("seq", "owner")})


def _no_rollout(id_: str) -> NotFound:
    return NotFound(f"no rollout {id_!r}", param="rollout_id")
