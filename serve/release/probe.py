"""Asks the engine, through its own generate, whether it answers as the verifier said this version does.

Comes in: a version's folder with `probe.json` (prompts, answers, the verifier's log-probabilities, an image or none)
and the raw engine, the gate still closed. Goes out: a `ProbeResult`, or an IntegrityError that says what was wrong.
Must not import vllm at import.

probe.json: {"tolerance_nats", "prompts": [{"prompt_token_ids", "answer_token_ids", "logprobs", "image_png"}]}. The
prompt ends with the answer's tokens, and has one placeholder token an image; the engine expands it, so only the tail
of what it scores is compared. Each log-probability is log p(token | all before it), in nats.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, Field, ValidationError, model_validator

from noria.errors import IntegrityError
from serve.release.ports import Engine

PROBE_LIMIT_S = 120.0
PLAIN_TOKENS = tuple(range(4, 20))  # for a version without a probe: any tokens will do to look for NaN


class ProbePrompt(BaseModel):
    """One prompt with its answer at the end, and the log-probabilities of the answer's tokens."""

    prompt_token_ids: list[int] = Field(min_length=2)
    answer_token_ids: list[int] = Field(min_length=1)
    logprobs: list[float]
    image_png: str | None = None

    @model_validator(mode="after")
    def _lengths(self) -> ProbePrompt:
        answer = self.answer_token_ids
        if len(self.logprobs) != len(answer) or self.prompt_token_ids[-len(answer) :] != answer:
            raise ValueError("the prompt must end with the answer, and the answer have one logprob a token")
        return self


class Probe(BaseModel):
    """The file."""

    tolerance_nats: float = Field(gt=0)
    prompts: list[ProbePrompt] = Field(min_length=1)


@dataclass(frozen=True)
class ProbeResult:
    """`mean_abs_diff` in nats over `tokens` answer tokens; None where there was nothing to compare with.

    `by_kind` has it for the prompts with a picture (`image`) and for those without (`text`) by themselves.
    """

    mean_abs_diff: float | None
    tokens: int
    prompts: int
    by_kind: dict[str, float] = field(default_factory=dict)


class Prober:
    """Scores probes on one engine. `scoring` makes the sampling parameters; tests give their own."""

    def __init__(self, engine: Engine, scoring: Callable[[], Any] | None = None) -> None:
        self._engine = engine
        self._scoring = scoring or vllm_scoring

    async def run(self, folder: Path, *, compare: bool = True) -> ProbeResult:
        """Scores the probe of the version in `folder`; without a probe.json, fixed tokens, for finiteness only.

        `compare=False` looks for finiteness only, too. Raises IntegrityError (code `probe_failed`) when a
        log-probability is not finite, the mean |difference| over the prompts with a picture, or over those without, is
        above the tolerance, or the engine gives no answer within PROBE_LIMIT_S.
        """
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                return await self._run(folder / "probe.json", compare)
        except TimeoutError:
            raise _failed(f"the engine did not score it within {PROBE_LIMIT_S:g} s") from None

    async def _run(self, path: Path, compare: bool) -> ProbeResult:
        probe = await asyncio.to_thread(read_probe, path)
        if probe is None:
            scores = await self._score(PLAIN_TOKENS, None)
            _check_finite(scores[1:], 0)
            return ProbeResult(None, len(scores) - 1, 1)
        kinds: dict[str, list[float]] = {}
        for number, prompt in enumerate(probe.prompts):
            scores = (await self._score(prompt.prompt_token_ids, prompt.image_png))[-len(prompt.logprobs) :]
            _check_finite(scores, number)
            differences = kinds.setdefault("text" if prompt.image_png is None else "image", [])
            differences += [abs(a - b) for a, b in zip(scores, prompt.logprobs, strict=True)]
        every = [difference for differences in kinds.values() for difference in differences]
        if not compare:
            return ProbeResult(None, len(every), len(probe.prompts))
        means = {kind: sum(differences) / len(differences) for kind, differences in kinds.items()}
        for kind, mean in means.items():  # each by itself: text that is right must not hide another version's tower
            if not mean <= probe.tolerance_nats:
                raise _failed(
                    f"the engine's log-probabilities differ from the verifier's by {mean:.4g} nats on average over the "
                    f"{kind} prompts, {probe.tolerance_nats:g} are allowed"
                )
        return ProbeResult(sum(every) / len(every), len(every), len(probe.prompts), means)

    async def _score(self, token_ids: Sequence[int], image_png: str | None) -> list[float]:
        """Log-probabilities of the prompt's tokens; the first, which nothing precedes, is 0."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if image_png is not None:
            prompt["multi_modal_data"] = {"image": await asyncio.to_thread(_decode, image_png)}
        final: Any = None
        async for output in self._engine.generate(prompt, self._scoring(), f"noria-probe-{uuid.uuid4().hex}"):
            final = output
        if final is None or not final.prompt_logprobs:
            raise _failed("the engine gave no log-probabilities of the prompt")
        tokens = final.prompt_token_ids
        return [
            0.0 if entry is None else float(entry[token].logprob)
            for token, entry in zip(tokens, final.prompt_logprobs, strict=True)
        ]


def read_probe(path: Path) -> Probe | None:
    """The version's probe; None if it has none. Raises IntegrityError for one that cannot be read."""
    try:
        return Probe.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        raise IntegrityError(f"probe.json is not a probe: {error}", param="probe.json") from error


def vllm_scoring() -> Any:
    """vLLM's parameters for scoring a prompt: its tokens' raw log-probabilities, and the one token it must sample."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)


def _check_finite(scores: Sequence[float], number: int) -> None:
    if not all(math.isfinite(score) for score in scores):
        raise _failed(f"a log-probability of prompt {number} is not finite")


def _failed(what: str) -> IntegrityError:
    return IntegrityError(f"probe: {what}", param="probe.json", code="probe_failed")


def _decode(image_png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image_png))).convert("RGB")
