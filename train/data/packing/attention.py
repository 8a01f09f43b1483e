"""Attention over a packed row, sample by sample: exact, and without a mask of T times T.

Comes in: a transformers model whose text attention is `sdpa`. Goes out: the same model, whose text attention computes
each packed sample alone. Must not import `serve`.

transformers keeps packed samples apart under `sdpa` by a mask over the whole row, and every sample pays for all others:
the work grows with T squared. Here the borders are read from the positions, as FlashAttention does, and each sample is
a causal attention of its own. What is not packed goes transformers' own way. FlashAttention needs no help, and other
attentions are left as they are. (transformers' registry: https://huggingface.co/docs/transformers/attention_interface)

Shapes: B rows, H heads, T tokens, D numbers a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_sample"


def attend_by_sample(model: Any) -> bool:
    """Puts the attention in place where the text model's is `sdpa`; says whether it is there now."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    config = next((m.config for m in model.modules() if hasattr(getattr(m, "config", None), "get_text_config")), None)
    if config is None:
        return False
    text = config.get_text_config()
    if text is not config and text._attn_implementation == "sdpa":
        text._attn_implementation = NAME
    return bool(text._attn_implementation == NAME)


def _mask(
    *args: Any, attention_mask: Any = None, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Any:
    """No mask for whole rows, packed or plain; transformers' for padding, windows and steps of a generation."""
    whole = kwargs.get("q_length") is not None and kwargs["q_length"] == kwargs.get("kv_length")
    if attention_mask is None and local_size is None and not use_vmap and whole:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, **kwargs)


def _attention(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(B, T, H, D), as `sdpa_attention_forward` gives it."""
    borders = _borders(position_ids, query_BHTD) if attention_mask is None else []
    if len(borders) <= 2:
        told: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs
        )
        return told
    parts = []
    for start, end in pairwise(borders):
        part = [tensor[:, :, start:end] for tensor in (query_BHTD, key_BHTD, value_BHTD)]
        parts.append(sdpa_attention_forward(module, *part, None, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _borders(position_ids: torch.Tensor | None, query_BHTD: torch.Tensor) -> list[int]:
    """Where samples begin, and the row's end; nothing when this is no packed row."""
    tokens = query_BHTD.shape[2]
    if position_ids is None or query_BHTD.shape[0] != 1 or tuple(position_ids.shape) != (1, tokens):
        return []
    jumps = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    return [0, *jumps.tolist(), tokens]
