"""Which pictures may leave the blobs, decided where nobody can begin to refer to one meanwhile.

Comes in: sha256 of pictures, and what deletes a blob. Goes out: how many were deleted.
Must not import torch, vllm or fastapi.

The rule that makes it safe: a row in `images` means that the blob is there. Who adds a row looks, in the same
transaction, whether the blob is there (`add_completions`); who deletes a blob does so in a transaction that sees no
row. Both hold the marker `pictures`, so one of them is always first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import Connection, func, select

from noria.store.completions import Part, chunks
from noria.store.tables import images, jobs

AT_ONCE = 16  # blobs deleted in one transaction: capture waits for it


class PictureStore(Part):
    """The store's word on pictures."""

    def drop_pictures(self, sha256s: Sequence[str], delete: Callable[[str], None]) -> int:
        """Has `delete` remove each blob that no completion refers to by now; returns how many.

        What `delete` raises goes up; the sweep finds what is then left.
        """
        dropped = 0
        for start in range(0, len(sha256s), AT_ONCE):
            some = sha256s[start : start + AT_ONCE]
            with self._db.write() as conn:
                self._db.lock(conn, "pictures")
                known = _known(conn, some)
                for sha256 in some:
                    if sha256 not in known:
                        delete(sha256)
                        dropped += 1
        return dropped

    def unknown_pictures(self, sha256s: Sequence[str]) -> list[str]:
        """Those that no completion refers to."""
        with self._db.read() as conn:
            known = {sha256 for some in chunks(sha256s) for sha256 in _known(conn, some)}
        return [sha256 for sha256 in sha256s if sha256 not in known]

    def oldest_unfinished_job(self) -> float | None:
        """When the oldest job was made that is queued or runs: it may hold pictures that no completion refers to."""
        query = select(func.min(jobs.c.created_at)).where(jobs.c.state.in_(("queued", "running")))
        with self._db.read() as conn:
            found: float | None = conn.execute(query).scalar()
            return found


def _known(conn: Connection, some: Sequence[str]) -> set[str]:
    return set(conn.execute(select(images.c.sha256).where(images.c.sha256.in_(some))).scalars())
