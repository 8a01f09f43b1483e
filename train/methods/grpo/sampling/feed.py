"""The groups of each update with their figures; the adapter follows the weights, and the next batch may come early.

Comes in: batches, the policy's adapter. Goes out: `Update`s for the trainer, totals for the report. Must not import
`serve`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from noria.methods.grpo import GrpoSettings
from noria.records import Json
from train.methods.grpo.groups import deviation
from train.methods.grpo.sampling.batches import Batch, Batches, Raw
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.policy import Policy
from train.methods.grpo.trainer import Update


class SampledFeed:
    """Gives each update its groups. Close it: its thread ends, and the adapter is deleted.

    `counts`, `answers` and `seconds` are totals; `pictured` says whether a group with pictures was given.
    """

    def __init__(self, grpo: GrpoSettings, batches: Batches, policy: Policy, patience: Patience) -> None:
        self.counts: Counter[str] = Counter()
        self.answers = 0
        self.seconds = 0.0
        self.pictured = False
        self._grpo = grpo
        self._batches = batches
        self._policy = policy
        self._patience = patience
        self._ahead: Future[Raw] | None = None
        self._progress = self._told(0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling ahead") if grpo.overlap else None
        self._loaded = False

    def next(self, update: int) -> Update:
        """The groups of the next update; `update` are done. Raises as `Batches`."""
        ahead, self._ahead = self._ahead, None
        drawn = None if ahead is None else ahead.result()
        if not self._loaded or update - self._policy.update >= self._grpo.sync_every:
            self._policy.put(update)
            self._loaded = True
        batch = self._batches.batch(update, drawn)
        dealt = self._batches.dealt
        if self._thread is not None and update + self._grpo.iterations < self._grpo.steps:
            self._ahead = self._thread.submit(self._batches.draw, self._grpo.prompts_per_step)
        self.counts.update({name: count for name, count in batch.counts.items() if name not in ("left", "kept")})
        self.answers += sum(len(group.answers) for group in batch.seen)
        self.seconds += batch.seconds
        self.pictured |= any(group.prompt.images for group in batch.groups)
        self._progress = self._told(dealt)
        return Update(batch.groups, self._figures(batch, update))

    def progress(self) -> Json:
        """How many prompts were dealt for the updates so far, and what became of their groups."""
        return self._progress

    def restore(self, progress: Json) -> None:
        """Goes on behind the prompts that were dealt before."""
        self._batches.skip(progress["dealt"])
        self.counts = Counter(progress["counts"])
        self.answers, self.seconds = progress["answers"], progress["seconds"]
        self._progress = progress

    def close(self) -> None:
        """Ends what is under way, and unloads the adapter; whatever came before."""
        self._patience.end()
        try:
            if self._thread is not None:
                self._thread.shutdown(wait=True, cancel_futures=True)
        finally:
            self._policy.delete()

    def _told(self, dealt: int) -> Json:
        return {"dealt": dealt, "counts": dict(self.counts), "answers": self.answers, "seconds": self.seconds}

    def _figures(self, batch: Batch, update: int) -> dict[str, float]:
        told = {
            "groups": float(len(batch.groups)),
            "staleness": _mean([float(update - group.update) for group in batch.groups]),
            "rounds": float(batch.rounds),
            "sampling_s": round(batch.seconds, 3),
            "waits": float(self._patience.waits),
        }
        if not batch.seen:  # nothing that was asked was answered, and groups were left over
            return told
        answers = [one for group in batch.seen for one in group.answers]
        judged = [one.reward for one in answers if one.reward is not None]
        told |= {
            "reward": _mean(judged),
            "reward_std": deviation(judged),
            **{f"reward/{name}": value for name, value in batch.parts.items()},
            "zero_variance": _share([group.same for group in batch.seen]),
            "length": _mean([float(len(one.token_ids)) for one in answers]),
            "length_max": float(max(len(one.token_ids) for one in answers)),
            "cut": _share([one.cut for one in answers]),
            "unjudged": batch.unjudged / len(answers),
            "dropped": float(sum(batch.counts[name] for name in ("too_long", "refused", "superseded", "stale"))),
        }
        return told | ({"samples_per_s": round(len(answers) / batch.seconds, 3)} if batch.seconds else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
