"""Prompts, a reward that tells answers apart, and one training over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from noria.methods.grpo import GrpoSettings, PromptSource
from noria.module_settings import ModulePolicies
from noria.records import Json
from tests.unit.grpo.sampler import TinySampler
from train.data.samples import image_part
from train.data.sources import ImageLoader
from train.methods.grpo.groups import Prompt
from train.methods.grpo.method import GrpoReport, GrpoRun, Means, train_grpo
from train.methods.grpo.sampling.prompts import SourcePrompts
from train.rewards import Sample, combine
from train.stages.spec import Step

FIGURES: Json = {
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_tokens": 5,
    "max_rounds": 3,
    "wait_s": 1.0,
    "checkpoint_every": 100,
    "max_divergence": 10.0,
}


def prompt(number: int) -> Prompt:
    """Even ones show a drawn scene, odd ones are text alone."""
    text = f"what is it, number {number}"
    if number % 2:
        return Prompt(f"rows.jsonl:{number}", ({"role": "user", "content": text},), answers=("red",))
    ref = f"scene:train/one/0/{number}"
    message = {"role": "user", "content": [image_part(ref), {"type": "text", "text": text}]}
    return Prompt(f"rows.jsonl:{number}", (message,), (ref,), ("red",))


def prompts(count: int = 6) -> tuple[SourcePrompts, ...]:
    """One source of them."""
    return (SourcePrompts(PromptSource(source="rows.jsonl"), tuple(map(prompt, range(count)))),)


class Telling:
    """A reward that any two different texts are likely to differ in: between 0 and 1, from their letters."""

    name = "telling"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One value a sample."""
        return [worth(one.text) for one in samples]


class Constant:
    """A reward that tells nothing apart."""

    name = "constant"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """1, always."""
        return [1.0 for _ in samples]


def worth(text: str) -> float:
    """What `Telling` thinks of a text."""
    return sum(ord(letter) * (7 + place) for place, letter in enumerate(text)) % 101 / 100


def settings(**grpo: Any) -> GrpoSettings:
    """Small ones; `grpo` wins."""
    return GrpoSettings.model_validate({**FIGURES, **grpo})


def policies(learning_rate: float = 2e-3) -> Any:
    """A LoRA of the language model, everything else frozen."""
    stated = {"language_model": {"rank": 4, "alpha": 8, "learning_rate": learning_rate}}
    return ModulePolicies.model_validate(stated).resolved()


def run(
    checkpoint: Path,
    sampler: TinySampler,
    folder: Path,
    grpo: GrpoSettings,
    *,
    reward: Any = None,
    check: Callable[[], None] = lambda: None,
    on_step: Callable[[Step], None] = lambda step: None,
    learning_rate: float = 2e-3,
    asked: tuple[SourcePrompts, ...] | None = None,
    **more: Any,
) -> tuple[GrpoReport, list[Step]]:
    """Trains in float32, so that tolerances say something about formulas and not about rounding."""
    steps: list[Step] = []

    def heard(step: Step) -> None:
        steps.append(step)
        on_step(step)

    given = {
        "master": checkpoint,
        "adapters": (),
        "folder": folder,
        "out": folder / "adapter",
        "version": "v1",
        "prefix": "job_1-a1",
        "grpo": grpo,
        "policies": policies(learning_rate),
        "prompts": asked or prompts(),
        "dtype": torch.float32,
    }
    folder.mkdir(parents=True, exist_ok=True)
    means = Means(
        sampler=sampler,
        score=lambda applied, processor: combine([reward or Telling()]),
        images=ImageLoader(named=True),
        on_step=heard,
        check=check,
    )
    report = train_grpo(GrpoRun(**{**given, **more}), means)
    return report, steps


def losses(steps: Sequence[Step]) -> list[float]:
    """Of each update."""
    return [step.loss for step in steps]
