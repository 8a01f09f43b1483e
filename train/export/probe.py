"""The probe: fixed prompts with the answers that the quantised artefact must give, checked before a version goes live.

Comes in: the dequantised model in transformers and its processor. Goes out: `probe.json`.
Token ids hold one placeholder per picture, as a client's prompt does; the engine expands it. Log-probabilities are
natural, in float32, of the answer's tokens after everything before them.
Must not import vllm: the server scores the probe, this only writes it.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import TrainingError
from train.export.quantize import to_device
from train.export.rendering import encode_text, render

if TYPE_CHECKING:
    from PIL.Image import Image

ANSWER_TOKENS = 8
_QUESTIONS = (
    ("What is the capital of France?", False),
    ("What do you see in this picture?", True),
    ("Count to five.", False),
)


@dataclass(frozen=True)
class ProbePrompt:
    """One prompt with its greedy answer. `image_png` is base64, or None."""

    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    logprobs: list[float]
    image_png: str | None


def write_probe(model: Any, processor: Any, path: Path, tolerance_nats: float) -> list[ProbePrompt]:
    """Asks the model every fixed question and writes its answers. TrainingError when one is not finite."""
    import torch

    picture = probe_picture()
    prompts = []
    with torch.no_grad():
        for question, with_picture in _QUESTIONS:
            prompts.append(_ask(model, processor, question, picture if with_picture else None))
    if not all(torch.isfinite(torch.tensor(prompt.logprobs)).all() for prompt in prompts):
        raise TrainingError("the quantised model answers the probe with log-probabilities that are not finite")
    content = {"tolerance_nats": tolerance_nats, "prompts": [asdict(prompt) for prompt in prompts]}
    path.write_text(json.dumps(content) + "\n")
    return prompts


def probe_picture() -> Image:
    """A red disc and a blue square on white, 96 by 96: the same pixels on every machine."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((12, 12, 52, 52), fill=(200, 30, 30))
    draw.rectangle((52, 52, 84, 84), fill=(30, 30, 200))
    return picture


def _ask(model: Any, processor: Any, question: str, picture: Image | None) -> ProbePrompt:
    import torch

    content = [{"type": "image"}] if picture is not None else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    text = render(processor, messages)
    images = [picture] if picture is not None else []
    inputs = to_device(encode_text(processor, text, images), model)
    length = inputs["input_ids"].shape[1]
    answered = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    answer = answered[0, length:].tolist()
    full = _extended(inputs, answered[:, length:])
    logits = model(**full, use_cache=False).logits[0, length - 1 : -1].float()
    logps = torch.log_softmax(logits, dim=-1).gather(1, answered[0, length:, None])[:, 0]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ProbePrompt([*ids, *answer], answer, logps.tolist(), _png(picture))


def _extended(inputs: dict[str, Any], answer: Any) -> dict[str, Any]:
    """The inputs with the answer's tokens after them; per-token masks grow with them."""
    import torch

    length = inputs["input_ids"].shape[1]
    full = {"input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    for name, value in inputs.items():
        if name == "input_ids":
            continue
        per_token = value.ndim == 2 and value.shape == (1, length)
        fill = 1 if name == "attention_mask" else 0
        full[name] = torch.cat([value, torch.full_like(answer, fill)], dim=1) if per_token else value
    return full


def _png(picture: Image | None) -> str | None:
    if picture is None:
        return None
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
