"""Builds a tiny random LLaVA in a second: a complete checkpoint folder that transformers, vLLM and gptqmodel load.

Comes in: a path and sizes. Goes out: config, safetensors under the hub's names, a byte-level tokenizer, a processor and
a chat template. Nothing is downloaded. Imports torch and transformers inside functions only: collecting tests stays
quick.

The weights are drawn so that the model is a useful thing to test: layers of unit gain, so that images, training and
quantisation all move the answers; logits of some three nats' spread, so that rounding seldom changes a greedy answer;
tokens that are not printable score 0, so that answers are readable text.
"""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<image>"  # noqa: S105  a token of the vocabulary, no secret
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", IMAGE_TOKEN)
WORDS = (
    "the",
    "a",
    "of",
    "to",
    "in",
    "is",
    "and",
    "red",
    "green",
    "blue",
    "square",
    "circle",
    "big",
    "small",
    "yes",
    "no",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}{{ '<image>\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def build_tiny_vlm(
    path: Path,
    family: str = "llava",
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    tie_word_embeddings: bool = False,
    dtype: str = "float32",
) -> Path:
    """Writes the checkpoint folder and returns it. Same arguments, same bytes.

    `hidden` / `heads` is the head size; vLLM's CPU attention takes 32, 64, 80, 96 and more, and GPTQ kernels there
    take linears whose sizes are multiples of 32. An image becomes (image_size / patch_size)^2 tokens.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    if family != "llava":
        raise ValueError(f"family={family!r}: only 'llava' is written here; see tests.tiny_families")
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = llava_config(
        vocab_size=len(tokenizer) + -len(tokenizer) % 32,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    draw_weights(model, seed, readable_ids(tokenizer))
    wanted = getattr(torch, dtype)
    tensors = {hub_name(name): tensor.to(wanted).contiguous() for name, tensor in model.state_dict().items()}
    if tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(path)
    _write_generation_config(path, tokenizer)
    _write_processor(path, tokenizer, image_size, patch_size)
    return path


def hub_name(name: str) -> str:
    """The name that LLaVA checkpoints on the hub use for a tensor that transformers 5 calls `name`."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(f"{name} has no place in a LLaVA checkpoint")


def llava_config(
    *,
    vocab_size: int,
    image_token_id: int,
    pad_token_id: int,
    eos_token_id: int,
    hidden: int,
    layers: int,
    heads: int,
    image_size: int,
    patch_size: int,
    tie_word_embeddings: bool,
) -> Any:
    """A `LlavaConfig` with a CLIP tower and a Llama, as small as the kernels allow."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


def build_tokenizer() -> Any:
    """A fast tokenizer: special tokens, the 256 bytes, and a few whole words (with merges that reach them)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        spelled = "\u0120" + word  # the byte-level alphabet's letter for a space
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        padding_side="left",
    )


def readable_ids(tokenizer: Any) -> list[int]:
    """Ids whose text is printable ASCII, or a space: what a readable answer is made of."""
    printable = set(string.ascii_letters + string.digits + string.punctuation + " ")
    special = set(tokenizer.all_special_ids)
    texts = ((number, tokenizer.decode([number])) for number in range(len(tokenizer)) if number not in special)
    return [number for number, text in texts if text and set(text) <= printable]


def draw_weights(model: Any, seed: int, readable: list[int]) -> None:
    """Layers of unit gain; logits of some nats' spread over the readable tokens, and 0 for the others."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                fan_in = math.prod(weight.shape[1:])
                weight.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
        silent = torch.ones(head.shape[0], dtype=torch.bool)
        silent[readable] = False
        if head is model.get_input_embeddings().weight:
            head.mul_(3.0)  # tied: special tokens and odd bytes must keep an embedding
        else:
            head.mul_(3.0)[silent] = 0.0


def _write_generation_config(path: Path, tokenizer: Any) -> None:
    config = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_processor(path: Path, tokenizer: Any, image_size: int, patch_size: int) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(path)
    images.save_pretrained(path)
