"""One round of keeping less: completions past retention, then pictures that nothing refers to.

Comes in: a store, its blobs, the settings. Goes out: counts. The server does it in the background, `noria prefs prune`
by hand. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from noria.settings import PrivacySettings
from noria.store import Store
from noria.store.privacy import Pruned

PAUSE_S = 0.02  # between two transactions, so that those who wait to write come in


class OldBlobs(Protocol):
    """What this module needs of `noria.blobs.Blobs`."""

    def older_than(self, before: float) -> Iterator[list[str]]:
        """Names of pictures that nobody put since."""

    def delete(self, sha256: str) -> None:
        """Deletes a picture."""


@dataclass
class RoundCounts:
    """What one round took: pictures with their completions (`images`) and those that nothing referred to (`swept`)."""

    completions: int = 0
    preferences: int = 0
    feedback: int = 0
    images: int = 0
    swept: int = 0


def prune(
    store: Store,
    blobs: OldBlobs,
    settings: PrivacySettings,
    counts: RoundCounts | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> RoundCounts:
    """Deletes everything past retention, batch by batch, and adds up in `counts` as it goes; stops on `go_on`'s no."""
    counts = RoundCounts() if counts is None else counts
    limits = store.limits(settings.retention_days, settings.retention_count, settings.keep_judged)
    while go_on():
        took = store.prune(limits, settings.prune_batch)
        if not took.completions:
            break
        counts.completions += took.completions
        counts.preferences += took.preferences
        counts.feedback += took.feedback
        counts.images += store.drop_pictures(took.images, blobs.delete)
        time.sleep(PAUSE_S)
    return counts


def past_retention(store: Store, settings: PrivacySettings) -> Pruned:
    """What `prune` would take now."""
    return store.count_expired(store.limits(settings.retention_days, settings.retention_count, settings.keep_judged))


def sweep(
    store: Store,
    blobs: OldBlobs,
    settings: PrivacySettings,
    counts: RoundCounts | None = None,
    *,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
    go_on: Callable[[], bool] = lambda: True,
) -> RoundCounts:
    """Deletes pictures that no completion refers to: what a crash left, and what finished jobs read.

    Left alone is what was put within `sweep_grace_s`, or since the oldest job was made that is not over: a recipe's
    pictures lie in the blobs for as long as its job.
    """
    counts = RoundCounts() if counts is None else counts
    before = clock() - settings.sweep_grace_s
    job = store.oldest_unfinished_job()
    if job is not None:
        before = min(before, job - settings.sweep_grace_s)
    for names in blobs.older_than(before):
        if not go_on():
            break
        orphans = store.unknown_pictures(names)
        counts.swept += len(orphans) if dry_run else store.drop_pictures(orphans, blobs.delete)
    return counts
