"""What every stage is handed: the stores, the job, its settings and folder, and how to report and to be stopped.

Comes in: built by the daemon. Goes out: `JobContext`. Must not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from noria.blobs import Blobs
from noria.recipes import Recipe
from noria.records import STAGES, Job, Json, Stage
from noria.registry import Registry
from noria.settings import Settings, TrainSettings
from noria.store import Store
from train.data.samples import LoadImage
from train.data.sources import ImageLoader
from train.log import EventLog

# The share of a job's time that each stage takes, for one progress figure from 0 to 1.
SHARES: dict[Stage, float] = {
    "snapshot": 0.02,
    "train": 0.45,
    "merge": 0.03,
    "quantize": 0.35,
    "verify": 0.10,
    "publish": 0.02,
    "rollout": 0.03,
}
REPORT_EVERY_S = 0.5


@dataclass
class JobContext:
    """One attempt at one job. `done` maps finished stages to what they handed on; stages add to it in order."""

    store: Store
    registry: Registry
    blobs: Blobs
    settings: Settings
    train: TrainSettings
    job: Job
    owner: str
    check: Callable[[], None]
    log: EventLog
    recipe: Recipe | None = None
    done: dict[str, Json] = field(default_factory=dict)
    _reported_at: float = 0.0

    @property
    def folder(self) -> Path:
        """The job's working folder."""
        return self.settings.jobs_dir / self.job.id

    def begin(self, stage: Stage) -> None:
        """A stage starts: told at once, with a lease renewed here and now, so that no cancellation is overtaken."""
        self.check()
        self.store.heartbeat(self.job.id, self.owner, self.settings.train.lease_s)
        self._reported_at = 0.0
        self.progress(stage, 0.0)

    def wait(self, seconds: float) -> None:
        """Sleeps; for stages that wait for somebody else."""
        time.sleep(seconds)

    @property
    def images(self) -> LoadImage:
        """Stored pictures and no others: for conversations that were captured."""
        return ImageLoader(self.blobs.get)

    @property
    def data_images(self) -> ImageLoader:
        """Whatever rows of data name: for what the job's recipe or settings name as data, and nothing else."""
        return ImageLoader(self.blobs.get, named=True)

    def progress(self, stage: Stage, share: float, words: str | None = None) -> None:
        """Reports how far a stage is (0 to 1), at most twice a second, and stops the work where it must stop.

        `words` stand beside the bar on a terminal, in place of the stage's name.
        """
        self.check()
        now = time.monotonic()
        if share < 1 and now - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at = now
        before = sum(SHARES[one] for one in STAGES[: STAGES.index(stage)])
        total = min(1.0, before + SHARES[stage] * share)
        self.store.set_progress(self.job.id, self.owner, stage=stage, progress=total)
        self.log.progress(words or stage, total)

    def metrics(self, values: Json) -> None:
        """Merges figures into the job's metrics."""
        self.store.set_progress(self.job.id, self.owner, metrics=values)

    def note(self, message: str, **keys: object) -> None:
        """A line in the job's history and in the log."""
        self.store.add_event(self.job.id, "log", {"message": message, **keys})
        self.log.event("note", job_id=self.job.id, message=message, **keys)
