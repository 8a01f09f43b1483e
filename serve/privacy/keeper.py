"""Retention and the sweep of pictures, in the background of a server.

Comes in: store, blobs, settings. Goes out: fewer rows, counters, a line in the log for each round that took something.
Must not import vllm.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import asdict

from noria.privacy.retention import OldBlobs, RoundCounts, prune, sweep
from noria.records import Json
from noria.settings import PrivacySettings
from noria.store import Store

logger = logging.getLogger("noria.privacy")


class Keeper:
    """Prunes every `prune_every_s` and sweeps every `sweep_every_s`, in a thread; totals since the start."""

    def __init__(self, store: Store, blobs: OldBlobs, settings: PrivacySettings) -> None:
        self._store, self._blobs, self._settings = store, blobs, settings
        self._stop = threading.Event()
        self.taken = RoundCounts()
        self.rounds = self.failures = 0

    def told(self) -> Json:
        """For the status: what was deleted since the server started."""
        return {"pruned": asdict(self.taken), "rounds": self.rounds, "failures": self.failures}

    async def run(self) -> None:
        """Until cancelled; a round that fails is logged, counted and tried again at its time."""
        swept_at = float("-inf")
        try:
            while True:
                with_sweep = time.monotonic() - swept_at >= self._settings.sweep_every_s
                if with_sweep:
                    swept_at = time.monotonic()
                await asyncio.to_thread(self._round, with_sweep)
                await asyncio.sleep(self._settings.prune_every_s)
        finally:
            self._stop.set()  # a thread cannot be cancelled: it looks between two batches

    def _round(self, with_sweep: bool) -> None:
        before = asdict(self.taken)
        try:
            prune(self._store, self._blobs, self._settings, self.taken, self._goes_on)
            if with_sweep:
                sweep(self._store, self._blobs, self._settings, self.taken, go_on=self._goes_on)
        except Exception as error:  # the next round may do better, and the server answers meanwhile
            self.failures += 1
            logger.warning("retention failed", extra={"reason": type(error).__name__}, exc_info=error)
        self.rounds += 1
        took = {key: value - before[key] for key, value in asdict(self.taken).items()}
        if any(took.values()):
            logger.info("retention", extra=took)

    def _goes_on(self) -> bool:
        return not self._stop.is_set()
