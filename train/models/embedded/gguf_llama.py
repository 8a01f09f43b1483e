"""Reads a Llama-architecture GGUF back into tensors under transformers' names.

Comes in: a GGUF file. Goes out: its sizes, its vocabulary, and float32 tensors one at a time.
llama.cpp stores the rows of q and k with the two halves of each rotary pair side by side; transformers keeps the halves
apart, so those rows are put back. Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import UnsupportedModel

if TYPE_CHECKING:
    import numpy as np

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL = 3  # GGUF's token type of special tokens


@dataclass(frozen=True)
class LlamaSizes:
    """The numbers of a Llama text model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float


class GgufLlama:
    """One GGUF file, open for reading. UnsupportedModel unless it is a Llama with tied embeddings."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader: Any = GGUFReader(str(path))
        if self._value("general.architecture") != "llama":
            raise UnsupportedModel(f"{path} is not a Llama model", param="source")
        if any(tensor.name == "output.weight" for tensor in self._reader.tensors):
            raise UnsupportedModel(f"{path} has an output layer of its own; tied embeddings are expected")
        self.sizes = LlamaSizes(
            layers=int(self._value("llama.block_count")),
            hidden=int(self._value("llama.embedding_length")),
            intermediate=int(self._value("llama.feed_forward_length")),
            heads=int(self._value("llama.attention.head_count")),
            kv_heads=int(self._value("llama.attention.head_count_kv")),
            vocab=int(self._value("llama.vocab_size")),
            context=int(self._value("llama.context_length")),
            rope_theta=float(self._value("llama.rope.freq_base")),
            norm_eps=float(f"{self._value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        )

    @property
    def tokens(self) -> list[str]:
        """The vocabulary in order of id."""
        return [str(token) for token in self._value("tokenizer.ggml.tokens")]

    @property
    def merges(self) -> list[str]:
        """The BPE merges, best first, each "left right"."""
        return [str(merge) for merge in self._value("tokenizer.ggml.merges")]

    @property
    def special(self) -> list[int]:
        """Ids of the control tokens."""
        return [index for index, kind in enumerate(self._value("tokenizer.ggml.token_type")) if kind == _CONTROL]

    def tensors(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Every tensor as (name beneath the text model, float32 array of shape (outputs, inputs) or (size,))."""
        from gguf import dequantize

        for tensor in self._reader.tensors:
            name = _rename(tensor.name)
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in reversed(tensor.shape)))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _unpermute(values, self.sizes.heads if "q_proj" in name else self.sizes.kv_heads)
            yield name, values

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise UnsupportedModel(f"the GGUF has no {key}")
        return field.contents()


def _rename(name: str) -> str:
    head, _, rest = name.partition(".")
    if head == "blk":
        layer, kind, leaf = rest.split(".")
        return f"layers.{layer}.{_BLOCK[kind]}.{leaf}"
    return f"{_TOP[head]}.{rest}"


def _unpermute(weight_OI: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from (pair, half) order back to (half, pair) order."""
    outputs, inputs = weight_OI.shape
    paired = weight_OI.reshape(heads, outputs // heads // 2, 2, inputs)
    return paired.swapaxes(1, 2).reshape(outputs, inputs)
