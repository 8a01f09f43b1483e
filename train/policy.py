"""When training starts by itself: a pure decision over a few facts, and the words for why it does not.

Comes in: the policy's settings and `Facts`. Goes out: a `Decision`. Must not import torch, nor touch the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from croniter import croniter

from noria.errors import SettingsError
from noria.methods.table import reads_of
from noria.settings import TrainSettings


@dataclass(frozen=True)
class Facts:
    """What is so now. Times are epoch seconds.

    `unused` counts judgements of the kind that the policy's method reads, that could train and that no job has used;
    `pairs` how many training pairs (or answers) the snapshot's rule makes of them, None while nobody has counted.
    `one_sided`: all of these have the same thumb. `busy` is a job that is queued or running.
    """

    now: float
    unused: int
    live: str | None
    busy: str | None = None
    pairs: int | None = None
    one_sided: bool = False
    last_automatic_at: float | None = None


@dataclass(frozen=True)
class Decision:
    """Start a job for `reason`, or stay idle and say why."""

    start: bool
    idle_reason: str | None
    reason: Literal["min_preferences", "window"] | None = None


def decide(train: TrainSettings, facts: Facts) -> Decision:
    """Whether an automatic job starts now. The first condition that fails is the one that is told."""
    policy = train.policy
    why = (
        _not_possible(train, facts)
        or _too_few(train, facts)
        or _too_soon(train, facts)
        or _outside(policy.window, facts.now)
    )
    if why is not None:
        return Decision(False, f"idle: {why}")
    return Decision(True, None, "min_preferences" if policy.window is None else "window")


def check_window(window: str | None) -> None:
    """Raises SettingsError for a window that is no cron expression."""
    if window is not None and not croniter.is_valid(window):
        raise SettingsError(
            f"train.policy.window={window!r} is not a cron expression like '* 2-5 * * *'", param="train.policy.window"
        )


def _not_possible(train: TrainSettings, facts: Facts) -> str | None:
    if facts.busy is not None:
        return f"job {facts.busy} is queued or runs in another trainer"
    if facts.live is None:
        return "no model is live yet; add one with `noria model add`"
    if not train.policy.automatic:
        return f"automatic training is off (train.policy.automatic); {_unused(train, facts)}"
    return None


def _too_few(train: TrainSettings, facts: Facts) -> str | None:
    needed = train.policy.min_preferences
    if facts.unused < needed:
        return f"{facts.unused} of {needed} unused {_read(train)}"
    if facts.pairs is not None and facts.pairs < train.min_pairs:
        made = "training pairs" if _read(train) == "preferences" else "training answers"
        return (
            f"{_unused(train, facts)} make {facts.pairs} {made}, {train.min_pairs} are needed "
            "(train.min_pairs); the others are duplicate, contradictory, unusable or held out"
        )
    if facts.one_sided:
        return f"{_unused(train, facts)} are all up or all down: thumbs of both kinds are needed"
    return None


def _too_soon(train: TrainSettings, facts: Facts) -> str | None:
    if facts.last_automatic_at is None:
        return None
    wait_s = facts.last_automatic_at + train.policy.min_interval_s - facts.now
    if wait_s <= 0:
        return None
    return f"{_unused(train, facts)}, next automatic start in {_span(wait_s)} (train.policy.min_interval_s)"


def _read(train: TrainSettings) -> str:
    return reads_of(train.policy.method) or "preferences"


def _unused(train: TrainSettings, facts: Facts) -> str:
    return f"{facts.unused} unused {_read(train)}"


def _outside(window: str | None, now: float) -> str | None:
    if window is None:
        return None
    at = datetime.fromtimestamp(now, UTC)
    if croniter.match(window, at):
        return None
    following: datetime = croniter(window, at).get_next(datetime)
    return f"waiting for the window {window!r} (UTC), next at {following:%Y-%m-%d %H:%M}"


def _span(seconds: float) -> str:
    whole = timedelta(seconds=round(seconds))
    return f"{whole.total_seconds():.0f} s" if whole < timedelta(minutes=2) else f"{whole // timedelta(minutes=1)} min"
