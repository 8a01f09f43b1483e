"""Builds a tiny random model of any family of the module map, alone or as a checkpoint: with tokenizer and processor.

Comes in: a family's `model_type`, a path. Goes out: a model, or a folder that transformers loads, of a few hundred
kilobytes.
Nothing is downloaded. Imports torch and transformers inside functions only: collecting tests stays quick.
For LLaVA as vLLM and gptqmodel load it see `tests.tiny`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, build_tiny_vlm, build_tokenizer, draw_weights, readable_ids

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 64}
GRID = [[16, 32], [32, 16], [32, 32]]

FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": CLIP, "text_config": {"model_type": "llama"}},
    "llava_next": {
        "vision_config": CLIP,
        "text_config": {"model_type": "mistral"},
        "image_grid_pinpoints": GRID,
        "image_seq_length": 16,
    },
    "llava_onevision": {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "qwen2"},
        "image_grid_pinpoints": GRID,
        "image_seq_length": 16,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "qwen2_vl": {"vision_config": {**QWEN_TOWER, "embed_dim": 32, "mlp_ratio": 2}, "text_config": MROPE},
    "qwen2_5_vl": {
        "vision_config": {**QWEN_TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        "text_config": MROPE,
    },
    "qwen3_vl": {
        "vision_config": {
            **QWEN_TOWER,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        "text_config": MROPE,
    },
    "internvl": {
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "text_config": {"model_type": "qwen3"},
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    },
    "idefics3": {
        "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
        "text_config": {"model_type": "llama"},
    },
    "smolvlm": {"vision_config": {**TOWER, "image_size": 16, "patch_size": 4}, "text_config": {"model_type": "llama"}},
}
_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_PLACEHOLDER = {
    **dict.fromkeys(_QWEN, "<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl": "<IMG_CONTEXT>\n",
}
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_SPECIAL: dict[str, dict[str, str]] = {
    **dict.fromkeys(_QWEN, _QWEN_TOKENS),
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
_TILES = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>")


def random_model(family: str, **changes: Any) -> Any:
    """A model alone, on the CPU, of 64 tokens; `changes` win over the table."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = {**_sized(family, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2), **changes}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **config))


def build_tiny_family(path: Path, family: str, seed: int = 0) -> Path:
    """Writes the checkpoint folder and returns it. Same arguments, same bytes."""
    if family == "llava":
        return build_tiny_vlm(path, seed=seed)
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = family_tokenizer(family)
    processor = _processor(family, tokenizer)
    config = AutoConfig.for_model(family, **_config(family, tokenizer))
    model = AutoModelForImageTextToText.from_config(config)
    draw_weights(model, seed, readable_ids(tokenizer))
    for name, weight in model.named_parameters():
        if ".lambda_" in name:  # InternVL's layer scale: 0 would turn its tower off
            torch.nn.init.ones_(weight)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def family_tokenizer(family: str) -> Any:
    """The tiny tokenizer with the family's special tokens and its placeholder in the chat template."""
    from transformers import PreTrainedTokenizerFast

    plain = build_tokenizer()
    named = _SPECIAL.get(family, {"image_token": "<image>", "video_token": "<video>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        extra_special_tokens=named,
        chat_template=CHAT_TEMPLATE.replace("<image>\n", _PLACEHOLDER.get(family, "<image>\n")),
        model_max_length=2048,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*named.values(), *_TILES]})
    return tokenizer


def _sized(family: str, tokens: int, **ids: int) -> dict[str, Any]:
    """The family's configuration over a vocabulary of so many tokens."""
    config = FAMILIES[family]
    return {**config, **ids, "text_config": {**TEXT, "vocab_size": tokens, **ids, **config["text_config"]}}


def _config(family: str, tokenizer: Any) -> dict[str, Any]:
    token = _SPECIAL.get(family, {}).get("context_image_token") or _SPECIAL.get(family, {}).get(
        "image_token", "<image>"
    )
    size = len(tokenizer) + -len(tokenizer) % 32
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = _sized(family, size, **ids)
    numbers = {name: tokenizer.convert_tokens_to_ids(word) for name, word in _SPECIAL.get(family, {}).items()}
    config["image_token_id"] = tokenizer.convert_tokens_to_ids(token)
    if family in _QWEN:
        config["video_token_id"] = numbers["video_token"]
        config["vision_start_token_id"] = numbers["vision_bos_token"]
        config["vision_end_token_id"] = numbers["vision_eos_token"]
    if family in ("idefics3", "smolvlm"):
        config["scale_factor"] = 2
    return config


def _processor(family: str, tokenizer: Any) -> Any:
    import transformers as hf

    template = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    square = {"size": {"height": 16, "width": 16}}
    if family in _QWEN:
        images = hf.Qwen2VLImageProcessor(
            patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        )
        kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        video = (hf.Qwen3VLVideoProcessor if family == "qwen3_vl" else hf.Qwen2VLVideoProcessor)(patch_size=4)
        return getattr(hf, f"{kind}Processor")(image_processor=images, video_processor=video, **template)
    if family == "llava_next":
        images = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=GRID
        )
        return hf.LlavaNextProcessor(
            images, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **template
        )
    if family == "llava_onevision":
        return hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=GRID),
            video_processor=hf.LlavaOnevisionVideoProcessor(**square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **template,
        )
    if family == "internvl":
        images = hf.GotOcr2ImageProcessor(**square, crop_to_patches=True, max_patches=2)
        video = hf.InternVLVideoProcessor(**square)
        return hf.InternVLProcessor(images, video_processor=video, image_seq_length=4, **template)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    # SmolVLM's own processor differs in videos only, for which it wants a package that is not installed
    return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**sizes), image_seq_len=4, **template)
