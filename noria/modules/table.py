"""The table itself: one row an architecture, and the look-up of a row by a checkpoint's `config.json`.

Sources of the three spellings: the files of the hub's checkpoints, transformers 5.17 (`named_parameters()` and its
`conversion_mapping`), vLLM 0.31 (`hf_to_vllm_mapper`). Embeddings and output layer belong to the language model, tied
or not; what joins tower and language model (projector, merger, connector, the newline embedding) is the aligner.
Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.errors import UnsupportedModel
from noria.modules.architecture import Architecture, Part
from noria.records import Module

_TEXT_MODELS = {  # decoders of the Llama layout -> whether they normalise queries and keys
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen2_vl_text": False,
    "qwen2_5_vl_text": False,
    "qwen3": True,
    "qwen3_vl_text": True,
}


def _parts(module: Module, hf: str, vllm: str, checkpoint: tuple[str, ...], names: tuple[str, ...]) -> tuple[Part, ...]:
    """Parts that differ only in what follows a common prefix."""
    return tuple(
        Part(
            module,
            hf + name,
            vllm + name,
            tuple(one + name for one in checkpoint),
            decoder=name == "layers.",
            blocks="" if name in ("layers.", "blocks.") else None,
        )
        for name in names
    )


def _language(hf: str, vllm: str, checkpoint: tuple[str, ...]) -> tuple[Part, ...]:
    return _parts("language_model", hf, vllm, checkpoint, ("layers.", "embed_tokens.", "norm."))


_LLAVA_LANGUAGE = (
    *_language("model.language_model.", "language_model.model.", ("language_model.model.", "model.language_model.")),
    Part("language_model", "lm_head.", "language_model.lm_head.", ("language_model.lm_head.", "lm_head.")),
)
_LLAVA_ALIGNER = Part(
    "aligner",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_LLAVA_NEWLINE = Part("aligner", "model.image_newline", "image_newline", ("image_newline", "model.image_newline"))
_CLIP_TOWER = Part(  # CLIP and SigLIP: transformers 5 dropped the inner `vision_model`
    "vision_tower",
    "model.vision_tower.",
    "vision_tower.",
    ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
    blocks="encoder.layers.",
    unread=("post_layernorm.", "head."),
)
_LLAVA = (_CLIP_TOWER, _LLAVA_ALIGNER, *_LLAVA_LANGUAGE)

_QWEN_PATHS = ("visual.", "model.visual.")
_QWEN2 = (
    *_parts("vision_tower", "model.visual.", "visual.", _QWEN_PATHS, ("patch_embed.", "blocks.")),
    *_parts("aligner", "model.visual.", "visual.", _QWEN_PATHS, ("merger.",)),
    *_language("model.language_model.", "language_model.model.", ("model.", "model.language_model.")),
    Part("language_model", "lm_head.", "language_model.lm_head.", ("lm_head.",)),
)
_QWEN3 = (
    *_parts("vision_tower", "model.visual.", "visual.", ("model.visual.",), ("patch_embed.", "pos_embed.", "blocks.")),
    *_parts("aligner", "model.visual.", "visual.", ("model.visual.",), ("merger.", "deepstack_merger_list.")),
    *_language("model.language_model.", "language_model.model.", ("model.language_model.",)),
    Part("language_model", "lm_head.", "language_model.lm_head.", ("lm_head.",)),
)
_IDEFICS3 = (
    Part(
        "vision_tower",
        "model.vision_model.",
        "model.vision_model.",
        ("model.vision_model.",),
        blocks="encoder.layers.",
    ),
    Part("aligner", "model.connector.", "model.connector.", ("model.connector.",)),
    *_language("model.text_model.", "model.text_model.", ("model.text_model.",)),
    Part("language_model", "lm_head.", "lm_head.", ("lm_head.",)),
)
_INTERNVL_TOWER = Part(
    "vision_tower",
    "model.vision_tower.",
    "vision_tower.",
    ("vision_tower.", "model.vision_tower."),
    blocks="encoder.layer.",
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("LLaVA 1.5", ("llava",), ("LlavaForConditionalGeneration",), _LLAVA, "llama"),
    Architecture(
        "LLaVA-NeXT", ("llava_next",), ("LlavaNextForConditionalGeneration",), (*_LLAVA, _LLAVA_NEWLINE), "llama"
    ),
    Architecture(
        "LLaVA-OneVision",
        ("llava_onevision",),
        ("LlavaOnevisionForConditionalGeneration",),
        (*_LLAVA, _LLAVA_NEWLINE),
        "qwen2",
    ),
    Architecture("Qwen2-VL", ("qwen2_vl",), ("Qwen2VLForConditionalGeneration",), _QWEN2, "qwen2_vl_text"),
    Architecture("Qwen2.5-VL", ("qwen2_5_vl",), ("Qwen2_5_VLForConditionalGeneration",), _QWEN2, "qwen2_5_vl_text"),
    Architecture("Qwen3-VL", ("qwen3_vl",), ("Qwen3VLForConditionalGeneration",), _QWEN3, "qwen3_vl_text"),
    Architecture(
        "InternVL (HF)",
        ("internvl",),
        ("InternVLForConditionalGeneration",),
        (_INTERNVL_TOWER, _LLAVA_ALIGNER, *_LLAVA_LANGUAGE),
        "qwen2",
    ),
    Architecture(
        "Idefics3 / SmolVLM",
        ("idefics3", "smolvlm"),
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        _IDEFICS3,
        "llama",
    ),
)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row for a checkpoint's `config.json`.

    Raises UnsupportedModel, saying what is supported, for an unknown model, class or language model.
    """
    model_type = config.get("model_type")
    classes = tuple(config.get("architectures") or ())
    for row in ARCHITECTURES:
        if model_type in row.model_types or (model_type is None and set(classes) & set(row.classes)):
            if classes and not set(classes) & set(row.classes):
                break  # the same model_type, but another implementation with other names
            return _with_text_model(row, config)
    known = ", ".join(f"{row.name} ({', '.join(row.classes)})" for row in ARCHITECTURES)
    what = f"model_type={model_type!r}, architectures={list(classes)!r}"
    raise UnsupportedModel(f"{what} is not in the module map, which knows: {known}", param="model_type")


def _with_text_model(row: Architecture, config: Mapping[str, Any]) -> Architecture:
    text = (config.get("text_config") or {}).get("model_type", row.text_default)
    if text in row.model_types:  # Qwen2-VL's older files name the whole model here
        text = row.text_default
    if text not in _TEXT_MODELS:
        known = ", ".join(_TEXT_MODELS)
        raise UnsupportedModel(
            f"{row.name} with a {text!r} language model is not in the module map, which knows: {known}",
            param="text_config.model_type",
        )
    return replace(row, qk_norm=_TEXT_MODELS[text])
