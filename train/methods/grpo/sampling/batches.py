"""One update's groups: sampled, scored, sorted into those that teach and those that do not, and none too old.

Comes in: a stream of prompts, the policy's adapter, a sampler, a scorer. Goes out: `Batch`es with counts of everything
that was left out. Must not import torch or `serve`.

Every group is counted: `asked` now + `left` by the update before = `used` + `kept` for the next update + `same` (zero
variance: its rewards are all the same) + `unusable` (no answer of it can be trained on) + `too_long` + `refused` (the
engine refuses it or fails at it, or it cannot be asked) + `superseded` (sampled from another version) + `stale`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from noria.errors import NoriaError, TrainingError
from noria.methods.grpo import GrpoSettings
from noria.records import Json
from noria.sampling.records import Drawing
from noria.sampling.records import Group as SampledGroup
from noria.sampling.records import Sample as Sampled
from train.methods.grpo.groups import Answer, Group, Prompt
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.policy import Policy
from train.methods.grpo.sampling.prompts import Stream
from train.methods.grpo.sampling.protocol import Sampler
from train.rewards import Sample, Scorer

LEFT_OUT = ("same", "unusable", "too_long", "refused", "superseded", "stale")
_LEAST_RATE = 0.25  # of groups that teach: so many more prompts than are missing are asked at most, 4 to 1
Wire = Callable[[Sequence[Json]], list[Json]]
"""A prompt's messages with its pictures as `data:` URLs. Raises TrainingError for one that cannot be asked."""


@dataclass(frozen=True)
class Raw:
    """What one round of sampling gave: prompts with their groups, and how many updates the policy had seen then.

    `refused` says why, for each prompt without a group.
    """

    groups: tuple[tuple[Prompt, SampledGroup], ...]
    update: int
    refused: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Batch:
    """The groups of one update, the first `counts["used"]` of what was sampled that teaches.

    `seen` are all groups that were scored for it, also those that teach nothing: figures of rewards are over these.
    """

    groups: tuple[Group, ...]
    seen: tuple[Group, ...]
    parts: dict[str, float]
    counts: dict[str, int]
    unjudged: int
    rounds: int
    seconds: float


@dataclass
class _Round:
    """What is added up over the rounds of one update."""

    taken: list[Group] = field(default_factory=list)
    seen: list[Group] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(("asked", "left", *LEFT_OUT), 0)))
    refused: list[str] = field(default_factory=list)
    unjudged: int = 0
    rounds: int = 0
    seconds: float = 0.0


class Batches:
    """Makes the batches of one training. For one thread; `draw` alone may run in another."""

    def __init__(
        self,
        grpo: GrpoSettings,
        stream: Stream,
        policy: Policy,
        sampler: Sampler,
        scorer: Scorer,
        wire: Wire,
        patience: Patience,
        image_id: int,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        """`tell` hears of the first prompt that is refused; all are counted."""
        self._grpo = grpo
        self._stream = stream
        self._policy = policy
        self._sampler = sampler
        self._scorer = scorer
        self._wire = wire
        self._patience = patience
        self._image_id = image_id
        self._tell: Callable[[str], None] | None = tell
        self._left: list[Group] = []
        self._rate = 1.0

    @property
    def dealt(self) -> int:
        """How many prompts were asked so far."""
        return self._stream.dealt

    def skip(self, count: int) -> None:
        """Goes on behind so many prompts, as a restart does."""
        self._stream.skip(count)

    def draw(self, count: int) -> Raw:
        """Asks the policy's adapter the next `count` prompts; waits for a server. Raises as `Patience`, LeaseLost."""
        dealt, began, update = self._stream.take(count), time.monotonic(), self._policy.update
        prompts, messages, refused = [], [], []
        for _, prompt in dealt:
            try:
                messages.append(self._wire(prompt.messages))
                prompts.append(prompt)
            except TrainingError as error:
                refused.append(f"{prompt.source}: {error.message}")
        seed = (self._grpo.seed * 1_000_003 + dealt[0][0] * 521) % 2**31
        found = self._patience.sample(self._sampler, self._policy.name, messages, self._drawing(seed))
        answered = [(prompt, found[place]) for place, prompt in enumerate(prompts)]
        refused += [f"{prompt.source}: {group.error}" for prompt, group in answered if group.error is not None]
        if refused and self._tell is not None:
            self._tell(f"a prompt is left out, and others may be; they are counted as refused: {refused[0]}")
            self._tell = None
        groups = tuple(pair for pair in answered if pair[1].error is None)
        return Raw(groups, update, tuple(refused), time.monotonic() - began)

    def batch(self, update: int, drawn: Raw | None = None) -> Batch:
        """The groups of the update that comes after `update` others; `drawn` was sampled before, for it.

        Raises TrainingError: nothing that teaches in `max_rounds` rounds (code `no_signal`), rewards that fail.
        """
        so_far, grpo = _Round(), self._grpo
        so_far.counts["left"] = len(self._left)
        self._take(self._left, update, so_far)
        while len(so_far.taken) < grpo.prompts_per_step and not self._enough(so_far):
            raw = drawn if drawn is not None else self.draw(self._wanted(so_far))
            drawn = None
            so_far.rounds += 1
            so_far.seconds += raw.seconds
            so_far.counts["asked"] += len(raw.groups) + len(raw.refused)
            so_far.counts["refused"] += len(raw.refused)
            so_far.refused += raw.refused
            self._take(self._scored(raw, so_far), update, so_far)
        if not so_far.taken:
            raise _no_signal(so_far, grpo)
        used, self._left = so_far.taken[: grpo.prompts_per_step], so_far.taken[grpo.prompts_per_step :]
        counts = {**so_far.counts, "used": len(used), "kept": len(self._left)}
        parts = {name: sum(values) / len(values) for name, values in so_far.parts.items() if values}
        seen = tuple(so_far.seen)
        return Batch(tuple(used), seen, parts, counts, so_far.unjudged, so_far.rounds, so_far.seconds)

    def _enough(self, so_far: _Round) -> bool:
        """Whether no further round is made: dropped groups are not replaced, unless nothing is left."""
        if so_far.rounds >= self._grpo.max_rounds:
            return True
        return self._grpo.zero_variance == "drop" and so_far.rounds > 0 and bool(so_far.taken)

    def _wanted(self, so_far: _Round) -> int:
        """Prompts of the next round: those that are missing, and more where many groups teach nothing."""
        grpo = self._grpo
        missing = grpo.prompts_per_step - len(so_far.taken)
        if grpo.zero_variance == "drop" or not grpo.max_staleness:
            return missing
        return min(grpo.prompts_per_step, math.ceil(missing / max(self._rate, _LEAST_RATE)))

    def _take(self, groups: Sequence[Group], update: int, so_far: _Round) -> None:
        """Those that are young enough: they are trained on in this update and, with iterations, in later ones."""
        oldest = self._grpo.max_staleness - (self._grpo.iterations - 1)
        for group in groups:
            if group.version != self._policy.version:
                so_far.counts["superseded"] += 1
            elif update - group.update > oldest:
                so_far.counts["stale"] += 1
            else:
                so_far.taken.append(group)

    def _scored(self, raw: Raw, so_far: _Round) -> list[Group]:
        """The round's groups that teach, with their rewards."""
        fitting = [pair for pair in raw.groups if self._fits(pair[1])]
        so_far.counts["too_long"] += len(raw.groups) - len(fitting)
        samples = [_sample(prompt, one) for prompt, group in fitting for one in group.samples]
        scores = self._scorer(samples)
        so_far.unjudged += sum(total is None for total in scores.totals)
        for name, values in scores.parts.items():
            so_far.parts.setdefault(name, []).extend(one for one in values if one is not None)
        found, at = [], 0
        for prompt, group in fitting:
            totals = scores.totals[at : at + len(group.samples)]
            at += len(totals)
            found.append(self._group(prompt, group, totals, raw.update))
        so_far.seen += found
        same = sum(one.same for one in found)
        teaching = [one for one in found if one.teaches]
        so_far.counts["same"] += same
        so_far.counts["unusable"] += len(found) - same - len(teaching)
        if found:
            self._rate = 0.5 * self._rate + 0.5 * len(teaching) / len(found)
        return teaching

    def _fits(self, group: SampledGroup) -> bool:
        return len(group.prompt_token_ids) + self._grpo.max_tokens <= self._grpo.max_length

    def _group(self, prompt: Prompt, group: SampledGroup, totals: Sequence[float | None], update: int) -> Group:
        if group.logprobs_temperature != self._grpo.temperature:
            raise TrainingError(
                f"the engine records log-probabilities at temperature {group.logprobs_temperature:g}, the policy is "
                f"trained at train.grpo.temperature={self._grpo.temperature:g}",
                code="temperature",
            )
        answers = []
        for one, total in zip(group.samples, totals, strict=True):
            if len(one.token_ids) != len(one.logprobs):
                told = f"{len(one.token_ids)} tokens and {len(one.logprobs)} log-probabilities"
                raise TrainingError(f"the engine gave a sample of {told}", code="bad_sample")
            cut = one.finish_reason == "length" and self._grpo.mask_truncated
            spoilt = not one.token_ids or self._image_id in one.token_ids  # a picture's token without a picture
            trains = total is not None and not cut and not spoilt
            answers.append(Answer(one.text, one.token_ids, one.logprobs, one.finish_reason, total, trains))
        return Group(prompt, group.prompt_token_ids, tuple(answers), update, group.version)

    def _drawing(self, seed: int) -> Drawing:
        grpo = self._grpo
        return Drawing(
            n=grpo.group_size,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            max_tokens=grpo.max_tokens,
            seed=seed,
        )


def _sample(prompt: Prompt, one: Sampled) -> Sample:
    return Sample(
        prompt=list(prompt.messages),
        text=one.text,
        finish_reason=one.finish_reason,
        answers=prompt.answers,
        extra=prompt.extra,
        tokens=len(one.token_ids),
    )


def _no_signal(so_far: _Round, grpo: GrpoSettings) -> NoriaError:
    why = ", ".join(f"{count} {reason}" for reason, count in so_far.counts.items() if count)
    told = [f"no group to learn from in {so_far.rounds} rounds of {grpo.prompts_per_step} prompts ({why})"]
    if so_far.refused:
        told.append(f"the first that was refused is {so_far.refused[0]}")
    if so_far.counts["too_long"]:
        told.append(f"too_long are those that with max_tokens are above train.grpo.max_length={grpo.max_length}")
    if so_far.seen:
        told.append(
            "a reward is needed that tells a prompt's answers apart, or prompts that are neither too easy nor too hard"
        )
    return TrainingError("; ".join(told), code="no_signal")
