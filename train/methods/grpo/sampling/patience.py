"""Waits for the engine: it may restart, or come back to the version that the job trains beside.

Comes in: calls to a sampler. Goes out: their results, or why nothing came of them within the bound. Must not import
torch or `serve`.

A sampler that reaches nobody raises Unavailable; one that finds another version everywhere raises Superseded. Both may
pass: a killed server is started again, a rollout is rolled back. Groups that have arrived stay; the others are asked
again. Every group names its version, so that none of another version's is ever trained on.

A prompt at which the engine fails each time looks like an engine that is gone. After `TRIES` tries from which nothing
came, the engine is asked a prompt that it has answered before: where it answers that one, and the others not at one
try more, these are refused, as those are that it refuses in words.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from noria.errors import Conflict, LeaseLost, NoriaError, Superseded, TrainingError, Unavailable
from noria.records import Json
from noria.sampling.records import Drawing, Group
from train.heartbeat import SHUTDOWN
from train.methods.grpo.sampling.protocol import Sampler

T = TypeVar("T")
FULL = "adapters_full"  # the server holds as many adapters as it may; a lease ends those that nobody deletes
TRIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LOOK_S = 0.5, 15.0, 0.1


class Patience:
    """Tries for `wait_s` without any success, in which `check` is called often and may raise; `tell` hears of waits.

    `waits` counts them.
    """

    def __init__(
        self, version: str, wait_s: float, check: Callable[[], None], tell: Callable[[str], None] = lambda words: None
    ) -> None:
        self.waits = 0
        self._version = version
        self._wait_s = wait_s
        self._check = check
        self._tell = tell
        self._over_now = threading.Event()
        self._answered: Sequence[Json] | None = None

    def end(self) -> None:
        """Whoever waits, in any thread, stops at the next look."""
        self._over_now.set()

    def __call__(self, call: Callable[[], T]) -> T:
        """What `call` returns. Raises TrainingError (code `no_sampling_engine`), Conflict (code `base_not_live`)."""
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except (Unavailable, Superseded, Conflict) as error:
                if isinstance(error, Conflict) and error.code != FULL:
                    raise
                self._wait(error, began, pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def require_version(self, sampler: Sampler) -> None:
        """Waits until the engine serves the job's version. Raises as a call."""

        def look() -> None:
            found = sampler.version()
            if found != self._version:
                raise Superseded(f"{found} serves, this job trains beside {self._version}")

        self(look)

    def sample(
        self, sampler: Sampler, adapter: str | None, prompts: Sequence[Sequence[Json]], drawing: Drawing
    ) -> dict[int, Group]:
        """A group for each prompt, by its place; one with an `error` for a prompt that is refused. Raises as a call."""
        found: dict[int, Group] = {}
        began, pause_s, failures, lives = time.monotonic(), _FIRST_PAUSE_S, 0, False
        while missing := [place for place in range(len(prompts)) if place not in found]:
            try:
                asked = [prompts[place] for place in missing]
                for group in sampler.sample(asked, drawing, adapter=adapter, version=self._version):
                    self._look()
                    found[missing[group.prompt]] = group
                    if group.error is None:
                        self._answered = prompts[missing[group.prompt]]
                    began, pause_s, failures, lives = time.monotonic(), _FIRST_PAUSE_S, 0, False
                break
            except (Unavailable, Superseded) as error:
                if lives and isinstance(error, Unavailable):
                    refused = {place: Group(place, tuple(prompts[place]), "", error=error.message) for place in missing}
                    return found | refused
                failures += 1
                self._wait(error, began, pause_s)
                lives = failures >= TRIES and self._lives(sampler, adapter, drawing)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
        return found

    def _lives(self, sampler: Sampler, adapter: str | None, drawing: Drawing) -> bool:
        """Whether the engine answers what it has answered before."""
        if self._answered is None:
            return False
        least = replace(drawing, n=1, max_tokens=1)
        try:
            for group in sampler.sample([self._answered], least, adapter=adapter, version=self._version):
                return group.error is None
        except (Unavailable, Superseded):
            pass
        return False

    def _wait(self, error: NoriaError, began: float, pause_s: float) -> None:
        """Sleeps, or raises when the patience is over."""
        waited = time.monotonic() - began
        if waited >= self._wait_s:
            raise self._over(error) from error
        self.waits += 1
        self._tell(f"waiting for the engine, {waited:.0f} of {self._wait_s:g} s: {error.message}")
        until = time.monotonic() + min(pause_s, self._wait_s - waited)
        while time.monotonic() < until:
            self._look()
            time.sleep(_LOOK_S)
        self._look()

    def _look(self) -> None:
        self._check()
        if self._over_now.is_set():
            raise LeaseLost("the training has ended", code=SHUTDOWN)

    def _over(self, error: NoriaError) -> NoriaError:
        if isinstance(error, Conflict):
            return error
        if isinstance(error, Superseded):
            return Conflict(
                f"the engine does not serve {self._version}, beside which this job trains: {error.message}. Its "
                f"adapter fits no other version: roll back to {self._version} and start the job again, or start a new "
                f"one on what is live now (waited {self._wait_s:g} s, train.grpo.wait_s)",
                code="base_not_live",
            )
        return TrainingError(
            f"no engine samples: {error.message} (waited {self._wait_s:g} s, train.grpo.wait_s; addresses are "
            "train.grpo.servers, else the setting url)",
            code="no_sampling_engine",
        )
