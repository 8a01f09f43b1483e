"""A tiny policy under a LoRA that has already moved, its trainer over a few judgements, and plain log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from PIL import Image

from noria.methods.preferences import SETTINGS
from noria.methods.table import PreferenceMethod
from noria.records import BLOB_SCHEME, Json, Pair, Thumb
from noria.settings import TrainSettings
from train.data.pairs import PairRenderer, TextPair, TextThumb, ThumbRenderer
from train.data.render import ChatRenderer
from train.methods.policies import Applied, apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.methods.preferences.guarded import GuardedTrainer
from train.methods.preferences.method import Judgements, make_trainer
from train.methods.preferences.steps import StepWatch

COLOURS = ("red", "green", "blue")
LORA = {"language_model": {"rank": 4, "alpha": 8, "learning_rate": 2e-3}}


def load_image(name: str) -> Image.Image:
    """A stored picture: here its name is its colour."""
    return Image.new("RGB", (40, 24), name)


def asked(number: int) -> tuple[tuple[Json, ...], tuple[str, ...]]:
    """Messages and their pictures: even numbers show one, odd ones are text alone."""
    colour = COLOURS[number % len(COLOURS)]
    shown: Any = {"type": "image_url", "image_url": {"url": BLOB_SCHEME + colour}}
    content: Any = [shown, {"type": "text", "text": "what is it"}] if number % 2 == 0 else f"say {colour} {number}"
    return ({"role": "user", "content": content},), ((colour,) if number % 2 == 0 else ())


def pair(number: int) -> Pair:
    """A pair whose answers differ in length."""
    messages, images = asked(number)
    chosen = f"a {COLOURS[number % len(COLOURS)]} square"
    return Pair(f"pref_{number}", f"h{number}", messages, chosen, "no" + " a" * number, 1.0, None, images)


def thumb(number: int, up: bool | None = None) -> Thumb:
    """An answer; where nothing is said, every third one has a thumb down."""
    messages, images = asked(number)
    good = bool(number % 3) if up is None else up
    answer = f"a {COLOURS[number % len(COLOURS)]} square" + " indeed" * number
    return Thumb(f"fb_{number}", f"h{number}", messages, answer, good, 1.0, None, images)


def text_pairs(master: Path, count: int) -> list[TextPair]:
    """So many pairs as text."""
    renderer = PairRenderer(ChatRenderer(load_processor(master)), load_image)
    return [renderer.render(pair(number)) for number in range(count)]


def text_thumbs(master: Path, count: int) -> list[TextThumb]:
    """So many answers as text."""
    renderer = ThumbRenderer(ChatRenderer(load_processor(master)), load_image)
    return [renderer.render(thumb(number)) for number in range(count)]


def settings(method: PreferenceMethod, count: int, **more: Any) -> Any:
    """The method's settings with all of `count` judgements in one forward."""
    told = {"epochs": 3, "batch_size": count, "micro_batch_size": count, "warmup_ratio": 0.0, **more}
    return SETTINGS[method].model_validate(told)


@dataclass
class Moved:
    """A trainer whose policy has moved away from its reference."""

    trainer: GuardedTrainer
    applied: Applied
    processor: Any
    judgements: Judgements

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """The trainer's loss of these rows in one micro-batch."""
        trainer = self.trainer
        inputs = trainer._prepare_inputs(trainer.data_collator([{"row": row} for row in rows]))
        trainer.model.train()
        return trainer.compute_loss(trainer.model, inputs)

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of everything that trains."""
        named = [(name, one) for name, one in self.trainer.model.named_parameters() if one.requires_grad]
        found = torch.autograd.grad(loss, [one for _, one in named], allow_unused=True)
        return {name: grad for (name, _), grad in zip(named, found, strict=True) if grad is not None}

    def logps(self, row: int, answer: str, *, reference: bool = False) -> torch.Tensor:
        """log p of each of the answer's tokens (T,), float64, one sequence at a time, from full logits."""
        one = self.judgements[row]
        prompt: str = one.prompt
        if reference:
            with torch.no_grad(), self.applied.reference():
                return token_logps(self.trainer.model, self.processor, prompt, one.images, answer)
        return token_logps(self.trainer.model, self.processor, prompt, one.images, answer)


def moved(master: Path, judgements: Judgements, asked_for: Any, out: Path, seed: int = 0, **policy: Any) -> Moved:
    """A trainer over the tiny model in float32, its LoRA drawn from `seed`."""
    architecture, processor = read_architecture(master), load_processor(master)
    transformers.set_seed(0)
    model = load_policy(master, [], architecture, torch.float32)
    train = TrainSettings.model_validate({"modules": policy or LORA})
    applied = apply_policies(model, architecture, train.policies())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    watch = StepWatch(lambda step: None, lambda: None, keeps=False)
    trainer = make_trainer(applied, judgements, processor, load_image, asked_for, {"output_dir": str(out)}, watch)
    return Moved(trainer, applied, processor, judgements)


def kto_paper(
    ratio: Callable[[int, str], torch.Tensor],
    thumbs: Sequence[TextThumb],
    rows: Sequence[int],
    weights: tuple[float, float],
    beta: float,
) -> tuple[torch.Tensor, float]:
    """https://arxiv.org/abs/2402.01306, section 4.1: E[lambda_y - v(x, y)], and its estimate of z_0 before clipping.

    v = lambda_D sigmoid(beta (r - z_0)) for desirable y, lambda_U sigmoid(beta (z_0 - r)) for the others, r = `ratio`
    of a row and its answer; z_0 is max(0, mean over the micro-batch of the ratio of another row's answer to the row's
    prompt).
    """
    shifted = [rows[-1], *rows[:-1]]
    crossed = [ratio(x, thumbs[y].answer) for x, y in zip(rows, shifted, strict=True)]
    estimate = torch.stack(crossed).mean().detach()
    z = estimate.clamp(min=0)
    terms = []
    for row in rows:
        r = ratio(row, thumbs[row].answer)
        value = torch.sigmoid(beta * (r - z)) if thumbs[row].up else torch.sigmoid(beta * (z - r))
        terms.append(weights[0 if thumbs[row].up else 1] * (1 - value))
    return torch.stack(terms).mean(), float(estimate)


def token_logps(model: Any, processor: Any, prompt: str, images: Sequence[str], answer: str) -> torch.Tensor:
    """(T,) for the T tokens of `answer` behind `prompt`."""
    pictures = [load_image(one) for one in images]
    inputs = dict(processor(text=[prompt], images=pictures or None, return_tensors="pt", add_special_tokens=False))
    answer_ids = processor.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer_ids)], dim=1)
    logits = model(**inputs).logits[0].double()
    return torch.log_softmax(logits[start - 1 : -1], dim=-1).gather(1, answer_ids[0][:, None])[:, 0]
