"""Policies to sample from: LoRAs in peft's own files on the tiny GPTQ model, and what torch says of their answers.

Comes in: a serving folder, seeds. Goes out: homes with two versions, adapters, and log-probabilities recomputed from
the engine's token ids.
Must not import vllm.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from noria.modules import architecture_of
from noria.records import Json
from noria.registry import ManifestDraft, Registry
from noria.store import Store
from tests.flow.rtn import quantize_rtn
from tests.tiny import build_tiny_vlm
from train.methods.quantized_base import GptqLinear, load_gptq

RANK, ALPHA = 4, 16
SMALL = {
    "NORIA_ENGINE__MAX_MODEL_LEN": "256",
    "NORIA_ENGINE__KV_CACHE_GIB": "0.25",
    "NORIA_RELEASE__POLL_S": "0.05",
}


class Policy:
    """A served checkpoint in float32, alone or under an adapter: the model that training would see."""

    def __init__(self, serving: Path, adapter: Path | None = None) -> None:
        from peft import PeftModel
        from transformers import AutoProcessor

        self.model, _ = dense(serving)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
        self.processor = AutoProcessor.from_pretrained(serving)

    def prompt_ids(self, messages: Sequence[Json]) -> list[int]:
        """The prompt's tokens as training makes them: the template's text through the processor."""
        from train.export.rendering import encode_text, render

        ids: list[int] = encode_text(self.processor, render(self.processor, messages), pictures(messages))["input_ids"][
            0
        ].tolist()
        return ids

    def logprobs(
        self, messages: Sequence[Json], prompt: Sequence[int], said: Sequence[int], temperature: float = 1.0
    ) -> list[float]:
        """log softmax(logits / temperature) of each token of `said` after `prompt`, in one forward over those ids."""
        inputs: Json = {"input_ids": torch.tensor([[*prompt, *said]])}
        shown = pictures(messages)
        if shown:
            inputs["pixel_values"] = self.processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits_TV = self.model(**inputs).logits[0, len(prompt) - 1 : -1].float()
        every_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        out: list[float] = every_TV[range(len(said)), list(said)].tolist()
        return out


def dense(serving: Path) -> tuple[Any, list[str]]:
    """The served model with its GPTQ linears unpacked into plain ones, which peft knows; and their names."""
    architecture = architecture_of(json.loads((serving / "config.json").read_text()))
    model = load_gptq(serving, architecture, torch.float32)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, GptqLinear)}
    for name, module in packed.items():
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight.data = module.unpacked(torch.float32).contiguous()
        if module.bias is not None:
            plain.bias.data = module.bias.data
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model.requires_grad_(False), list(packed)


def write_lora(serving: Path, out: Path, seed: int, strength: float = 0.1) -> Path:
    """A random LoRA on every linear of the language model, saved by peft itself."""
    from peft import LoraConfig, get_peft_model

    model, linears = dense(serving)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linears))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                scale = strength if "lora_B" in name else 1.0
                parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5, generator=generator)
    adapted.save_pretrained(out)
    return out


def picture(colour: tuple[int, int, int]) -> str:
    """A data URL of a small picture of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def pictures(messages: Sequence[Json]) -> list[Image.Image]:
    """The pictures that the messages show, in order."""
    found = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                found.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return found


def publish_both(home: Path, scratch: Path) -> None:
    """v1 (live) and v2: other weights in the same shape, without a probe."""
    home.mkdir(exist_ok=True)
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        registry = Registry(home / "models", store)
        for seed in (1, 2):
            quantize_rtn(build_tiny_vlm(scratch / f"source-{seed}", seed=seed, dtype="bfloat16"), scratch / f"v{seed}")
            staging = registry.begin("sampling")
            shutil.copytree(scratch / f"v{seed}", staging / "serving")
            registry.publish(staging, ManifestDraft(method="test"))
        store.promote("v1")
