"""Puts the embedded model's master together: a LLaVA of SmolLM2, a small CLIP tower and an MLP aligner.

Comes in: the GGUF of SmolLM2-135M-Instruct. Goes out: a complete checkpoint folder in bfloat16, in the hub's spelling.
Tower and aligner are random until they are trained, and the same on every machine: each tensor's numbers come from a
generator seeded with its name. Until then a picture should disturb the words around it as little as it can: the
aligner's bias is the embedding of a line break, and its weights add little noise to that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from noria.records import Json
from train.export.checkpoint import NewTensor, write_file
from train.export.gptq_format import to_new
from train.models.embedded.chatml import CHAT_TEMPLATE, build_tokenizer
from train.models.embedded.gguf_llama import GgufLlama, LlamaSizes
from train.models.embedded.tower import (
    HIDDEN_ACT,
    ONES,
    PATCH_SIZE,
    PATCHES,
    PICTURE_SIZE,
    TOWER_HEADS,
    TOWER_LAYERS,
    TOWER_WIDTH,
    made_tensors,
    random_shapes,
)

if TYPE_CHECKING:
    import torch

_VOCAB_MULTIPLE = 64
_END_ID, _START_ID, _TURN_END_ID = 0, 1, 2  # the ids of the three tokens in SmolLM2's vocabulary
_ALIGNER = "multi_modal_projector."
_LINE_BREAK = "Ċ"  # how byte-level BPE writes it
_NOISE = 0.25  # the picture's part of the aligner's output, in standard deviations of a word embedding


def assemble(gguf: Path, out: Path, progress: Callable[[float], None]) -> None:
    """Writes the checkpoint into the existing folder `out`; `progress` goes from 0 to 1."""
    import torch

    source = GgufLlama(gguf)
    sizes = source.sizes
    vocab = -(-(sizes.vocab + 1) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    tensors: list[NewTensor] = []
    embedding = torch.empty(0)
    count = 2 + 9 * sizes.layers
    for done, (name, values) in enumerate(source.tensors(), start=1):
        weight = torch.from_numpy(values.copy())  # the reader maps the file read-only
        if name == "embed_tokens.weight":
            embedding = weight
            weight = _with_new_rows(weight, vocab)
        tensors.append(to_new(f"language_model.model.{name}", weight.to(torch.bfloat16)))
        progress(0.9 * done / count)
    tensors += [to_new(name, value.to(torch.bfloat16)) for name, value in made_tensors().items()]
    for name, shape, std in [*random_shapes(), *_aligner_shapes(sizes.hidden, _NOISE * float(embedding.std()))]:
        tensors.append(to_new(name, _random(name, shape, std).to(torch.bfloat16)))
    line_break = embedding[source.tokens.index(_LINE_BREAK)]
    tensors.append(to_new(f"{_ALIGNER}linear_2.bias", line_break.to(torch.bfloat16)))
    write_file(out / "model.safetensors", sorted(tensors, key=lambda tensor: tensor.name))
    _write_json(out / "config.json", _config(sizes, vocab))
    _write_json(out / "generation_config.json", _generation_config())
    _write_processor(out, source)
    progress(1.0)


def _with_new_rows(weight: torch.Tensor, vocab: int) -> torch.Tensor:
    """Rows for `<image>` and the padding: the mean embedding, which the tied output layer never ranks high."""
    import torch

    return torch.cat([weight, weight.mean(0, keepdim=True).expand(vocab - weight.shape[0], -1)])


def _aligner_shapes(hidden: int, output_std: float) -> list[tuple[str, tuple[int, ...], float]]:
    """The aligner's tensors but its last bias: name, shape, standard deviation (0 for zeros)."""
    return [
        (f"{_ALIGNER}linear_1.weight", (hidden, TOWER_WIDTH), TOWER_WIDTH**-0.5),
        (f"{_ALIGNER}linear_1.bias", (hidden,), 0.0),
        (f"{_ALIGNER}linear_2.weight", (hidden, hidden), output_std * hidden**-0.5),
    ]


def _random(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    import torch

    if std == ONES:
        return torch.ones(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def _config(sizes: LlamaSizes, vocab: int) -> Json:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "image_token_index": sizes.vocab,
        "image_seq_length": PATCHES,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": _text_config(sizes, vocab),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": 4 * TOWER_WIDTH,
            "num_hidden_layers": TOWER_LAYERS,
            "num_attention_heads": TOWER_HEADS,
            "image_size": PICTURE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": TOWER_WIDTH,
            "hidden_act": HIDDEN_ACT,
        },
    }


def _text_config(sizes: LlamaSizes, vocab: int) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "tie_word_embeddings": True,
        "vocab_size": vocab,
        "bos_token_id": _START_ID,
        "eos_token_id": _TURN_END_ID,
        "pad_token_id": _END_ID,
    }


def _generation_config() -> Json:
    return {"bos_token_id": _START_ID, "eos_token_id": [_TURN_END_ID, _END_ID], "pad_token_id": _END_ID}


def _write_processor(out: Path, source: GgufLlama) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True),
        tokenizer=build_tokenizer(source.tokens, source.merges, source.special, source.sizes.context),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
