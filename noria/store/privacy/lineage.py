"""Which jobs used what, and the mark that stays on them when an end user is forgotten.

Comes in: ids of conversations and judgements that jobs used; what a deletion is about to take. Goes out: counts by job
and part, never a name: of a forgotten user only a hash is kept, keyed with a secret of this store.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, or_, select, update

from noria.records import Json
from noria.store.completions import Part
from noria.store.connection import Database
from noria.store.privacy.tables import forgotten, forgotten_uses, job_uses
from noria.store.tables import jobs, markers, snapshot_items, snapshot_jobs, versions

TRAINED = ("train", "prompts", "reward")
"""Parts that the weights learnt from; `calibration` set the quantised weights' scales; the rest was only measured."""
WEIGHTS = (*TRAINED, "calibration")
PARTS = (*WEIGHTS, "held_out", "verification")


class LineageStore(Part):
    """What the store knows of jobs and what they used."""

    def note_uses(self, job_id: str, parts: Mapping[str, Iterable[str]]) -> None:
        """Notes ids of conversations, preferences or feedback that a job uses, by part; noted again changes nothing.

        What stands in the job's snapshot need not be noted.
        """
        rows = [
            {"job_id": job_id, "part": part, "ref": ref} for part, refs in parts.items() for ref in dict.fromkeys(refs)
        ]
        if rows:
            with self._db.write() as conn:
                conn.execute(self._db.insert_new(job_uses), rows)

    def uses(self, job_id: str) -> dict[str, list[str]]:
        """What was noted of a job, by part."""
        found: dict[str, list[str]] = defaultdict(list)
        query = select(job_uses).where(job_uses.c.job_id == job_id).order_by(job_uses.c.part, job_uses.c.ref)
        with self._db.read() as conn:
            for row in conn.execute(query):
                found[row.part].append(row.ref)
        return dict(found)

    def forgotten_uses(self, job_id: str) -> dict[str, int]:
        """How much of what the job used was an end user's who has been forgotten since, by part."""
        total = func.sum(forgotten_uses.c.count).label("how_many")
        query = select(forgotten_uses.c.part, total).where(forgotten_uses.c.job_id == job_id)
        with self._db.read() as conn:
            return {row.part: int(row.how_many) for row in conn.execute(query.group_by(forgotten_uses.c.part))}

    def clear_forgotten_uses(self, job_id: str, parts: Iterable[str] = TRAINED) -> None:
        """Takes the marks off a job whose training begins again, without what was forgotten."""
        mine = forgotten_uses.c.job_id == job_id, forgotten_uses.c.part.in_(tuple(parts))
        with self._db.write() as conn:
            conn.execute(delete(forgotten_uses).where(*mine))

    def forgotten_of(self, version: str) -> Json:
        """What is known of forgotten users in a version's weights.

        `users` differ by their hash; `uses` are counts by part (`train`, `prompts`, `reward`, `calibration`);
        `inherited` are those in its ancestors' weights, of which this version's are made.
        """
        with self._db.read() as conn:
            lineage = _ancestors(conn, version)
            own, own_uses = _users(conn, lineage[:1])
            before, _ = _users(conn, lineage[1:])
        return {"users": len(own), "uses": own_uses, "inherited": len(before)}


def lineage_of(conn: Connection, refs: list[Select[Any]]) -> dict[tuple[str, str], int]:
    """How much of what `refs` select (ids) stands in each job's snapshot and notes: (job id, part) -> count."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    in_snapshots = (
        select(snapshot_jobs.c.job_id, snapshot_items.c.part, func.count().label("how_many"))
        .join(snapshot_items, snapshot_items.c.snapshot_id == snapshot_jobs.c.snapshot_id)
        .where(or_(*(snapshot_items.c.preference_id.in_(ref) for ref in refs)))
        .where(snapshot_items.c.part.in_(PARTS))
        .group_by(snapshot_jobs.c.job_id, snapshot_items.c.part)
    )
    noted = (
        select(job_uses.c.job_id, job_uses.c.part, func.count().label("how_many"))
        .where(or_(*(job_uses.c.ref.in_(ref) for ref in refs)))
        .group_by(job_uses.c.job_id, job_uses.c.part)
    )
    for query in (in_snapshots, noted):
        for row in conn.execute(query):
            found[(row.job_id, row.part)] += int(row.how_many)
    return dict(found)


def mark(
    database: Database, conn: Connection, now: float, user: str, counts: Json, used: Mapping[tuple[str, str], int]
) -> None:
    """Leaves the mark of a deletion, in the deletion's own transaction."""
    made = "forg_" + secrets.token_hex(12)
    row = {"id": made, "user_hash": _hash(database, conn, user), "forgotten_at": now, "counts": counts}
    conn.execute(insert(forgotten), row)
    rows = [
        {"forgotten_id": made, "job_id": job_id, "part": part, "count": count} for (job_id, part), count in used.items()
    ]
    if rows:
        conn.execute(insert(forgotten_uses), rows)


def told(conn: Connection, used: Mapping[tuple[str, str], int]) -> Json:
    """Lineage for people: `versions` that were trained on it, `inherited` (made of those), unfinished `jobs`."""
    parts: dict[str, dict[str, int]] = defaultdict(dict)
    for (job_id, part), count in sorted(used.items()):
        parts[job_id][part] = count
    published = conn.execute(select(versions.c.id, versions.c.state, versions.c.job, versions.c.parent)).all()
    direct = [row for row in published if row.job in parts]
    in_weights = {row.id for row in direct if set(parts[row.job]) & set(WEIGHTS)}
    inherited: list[str] = []
    for row in published:  # ids are given out in order, but a parent may stand anywhere
        if row.id not in in_weights and in_weights & set(_ancestors(conn, row.id)):
            inherited.append(row.id)
    unfinished = select(jobs.c.id, jobs.c.state).where(jobs.c.state.in_(("queued", "running"))).order_by(jobs.c.seq)
    return {
        "versions": [{"version": row.id, "state": row.state, "job": row.job, "uses": parts[row.job]} for row in direct],
        "inherited": inherited,
        "jobs": [
            {"job": row.id, "state": row.state, "uses": parts[row.id]}
            for row in conn.execute(unfinished)
            if row.id in parts
        ],
    }


def _users(conn: Connection, of: list[str]) -> tuple[set[str], dict[str, int]]:
    """Hashes of the forgotten users in these versions' own weights, and what of theirs was used, by part."""
    query = (
        select(forgotten.c.user_hash, forgotten_uses.c.part, forgotten_uses.c.count.label("how_many"))
        .join(forgotten_uses, forgotten_uses.c.forgotten_id == forgotten.c.id)
        .join(versions, versions.c.job == forgotten_uses.c.job_id)
        .where(versions.c.id.in_(of), forgotten_uses.c.part.in_(WEIGHTS))
    )
    users: set[str] = set()
    uses: dict[str, int] = defaultdict(int)
    for row in conn.execute(query):
        users.add(row.user_hash)
        uses[row.part] += row.how_many
    return users, dict(uses)


def _ancestors(conn: Connection, version: str) -> list[str]:
    """The version and those that it was made of, newest first."""
    parents = {row.id: row.parent for row in conn.execute(select(versions.c.id, versions.c.parent))}
    found: list[str] = []
    at: str | None = version
    while at is not None and at not in found:
        found.append(at)
        at = parents.get(at)
    return found


def _hash(database: Database, conn: Connection, user: str) -> str:
    """Without the store's key nobody can try names against a list of hashes."""
    database.lock(conn, "forget_key")
    mine = markers.c.key == "forget_key"
    key = conn.execute(select(markers.c.value).where(mine)).scalar()
    if key is None:
        key = secrets.token_hex(32)
        conn.execute(update(markers).where(mine).values(value=key))
    return hmac.new(bytes.fromhex(key), user.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
