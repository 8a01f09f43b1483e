"""Tiny stand-ins: a LLaVA in bfloat16 with the deltas of three stages, a Llama as GGUF, what `noria eval` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noria.evals.scores import rate_of
from noria.records import Json, Module
from tests.tiny import build_tiny_vlm
from train.methods.delta import save_delta
from train.models.embedded.download import GGUF_NAME, GGUF_SHA256
from train.models.embedded.eyes.record import recipe_hash

VISION: Mapping[Module, str] = {"vision_tower": "full", "aligner": "frozen", "language_model": "frozen"}
ALIGN: Mapping[Module, str] = {"vision_tower": "frozen", "aligner": "full", "language_model": "frozen"}
SFT: Mapping[Module, str] = {"vision_tower": "frozen", "aligner": "full", "language_model": "lora"}
STAGES = (("01-vision", VISION), ("02-align", ALIGN), ("03-sft", SFT))
RECIPE: Json = {
    "name": "embedded",
    "stages": [
        {"name": "vision", "kind": "vision", "steps": 2, "data": [{"source": "scenes", "count": 12}]},
        {"name": "align", "kind": "align", "steps": 3, "data": [{"source": "digits", "count": 6}]},
        {
            "name": "sft",
            "kind": "sft",
            "steps": 4,
            "data": [{"source": "scenes", "count": 80}, {"source": "text", "count": 30}],
        },
    ],
}


def build_master(folder: Path) -> Path:
    """A tiny LLaVA in bfloat16."""
    return build_tiny_vlm(folder, dtype="bfloat16")


def write_delta(master: Path, out: Path, policies: Mapping[Module, str], seed: int = 0, rank: int = 4) -> Path:
    """What a stage would leave that moved everything it may move, by random numbers, in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from train.methods.delta import model_architecture

    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_pretrained(master, dtype=torch.float32)
    arch = model_architecture(model)
    parameters = dict(model.named_parameters())
    full = [name for name in parameters if policies[arch.module_of(name)] == "full" and arch.is_read(name)]
    linears = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    adapted = [name for name in linears if policies[arch.module_of(f"{name}.weight")] == "lora"]
    model.requires_grad_(False)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=adapted))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    for name in full:
        parameters[name].requires_grad_(True).data.add_(torch.randn_like(parameters[name]), alpha=0.3)
    save_delta(model, out, dict(policies))
    return out


def write_stages(master: Path, adapter: Path) -> Path:
    """The `adapter/` of a finished recipe job."""
    for number, (name, policies) in enumerate(STAGES):
        write_delta(master, adapter / name, policies, seed=number)
    return adapter


def told(**more: Any) -> Json:
    """A record's values beside those of the weights."""
    from noria.recipes import parse_recipe

    stage = {"steps": 2, "seconds": 61.5, "samples": 12, "data_sha256": "sha256:ab", "trainable_parameters": 1234}
    losses = {"loss_first": 3.25, "loss_last": 0.5}
    return {
        "language_model": GGUF_NAME,
        "language_model_sha256": GGUF_SHA256,
        "recipe": RECIPE,
        "recipe_sha256": recipe_hash(parse_recipe(RECIPE)),
        "stages": [{"name": one["name"], "kind": one["kind"], **stage, **losses} for one in RECIPE["stages"]],
        "version": "v2",
        "job": "job_1",
        "created_at": 1.0,
        "machine": "2 cores",
        "versions": {"python": "3.11.7"},
        **more,
    }


def evaluation(set_name: str, right: Mapping[str, tuple[int, int]]) -> Json:
    """What `noria eval --json` prints of one set: right answers and questions of each kind."""
    scores = {kind: [1.0] * good + [0.0] * (n - good) for kind, (good, n) in right.items()}
    whole = rate_of(score for rows in scores.values() for score in rows)
    kinds = {kind: rate_of(rows) for kind, rows in scores.items()}
    return {"set_name": set_name, "scores": {**whole, "categories": kinds}, "bad_rows": [], "version": "v1"}


def printed(path: Path, *evaluations: Json) -> Path:
    """A file that holds what `noria eval --json` printed."""
    path.write_text(json.dumps({"object": "list", "data": list(evaluations), "compared": []}))
    return path


def write_gguf(path: Path, hidden: int = 64, layers: int = 2, heads: int = 2) -> Path:
    """A tiny Llama with tied embeddings and a byte-level vocabulary, as SmolLM2's file spells it."""
    import numpy as np
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "no"]
    draw = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(2048)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(tokens)
    writer.add_token_merges(["n o"])
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
        wide = {"ffn_gate": (2 * hidden, hidden), "ffn_up": (2 * hidden, hidden), "ffn_down": (hidden, 2 * hidden)}
        norms = {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {**square, **wide, **norms}.items()}
    for name, shape in shapes.items():
        values = draw.normal(0.0, 0.1, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
