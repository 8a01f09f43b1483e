"""One architecture of the map and what can be asked of it.

Comes in: the rows of `noria.modules.table`. Goes out: modules of names, linears, the GPTQ tree, names in a checkpoint.
Names are matched by whole prefixes, never by substrings: a prefix ends in a dot, or is one parameter's full name.
Must not import torch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from noria.errors import UnsupportedModel
from noria.records import MODULES, Module

Spelling = Literal["checkpoint", "hf", "vllm"]
"""Whose names: the safetensors files', `named_parameters()` of transformers, or `named_parameters()` of vLLM."""

_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_PACKED = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}  # as vLLM fuses them
_FOLLOWS = {"o_proj", "down_proj"}  # linears that read what the others of their block put out


@dataclass(frozen=True)
class Part:
    """One subtree (or single parameter) of a model: the module it belongs to and its prefix in each spelling.

    `checkpoint` lists every spelling found in files, the hub's first. `decoder` marks the stack of decoder layers.
    `blocks` is what stands between the prefix and a block's number, in transformers' names; none where there are none.
    `unread` are subtrees behind the prefix that are stored and never read, like the last norm of a tower whose hidden
    states are taken before it.
    """

    module: Module
    hf: str
    vllm: str
    checkpoint: tuple[str, ...]
    decoder: bool = False
    blocks: str | None = None
    unread: tuple[str, ...] = ()

    def prefixes(self, spelling: Spelling) -> tuple[str, ...]:
        """The part's prefixes in one spelling."""
        if spelling == "checkpoint":
            return self.checkpoint
        return (self.hf,) if spelling == "hf" else (self.vllm,)


@dataclass(frozen=True)
class GptqTree:
    """What a definition of gptqmodel needs, in transformers' names.

    `module_tree` is in gptqmodel's notation: `:N` is the order in which linears of a block are quantised, `:!` marks
    what is left alone. `outside` are the modules beside the decoder layers that calibration runs through.
    """

    layers_node: str
    module_tree: tuple[Any, ...]
    norm: str
    rotary_embedding: str
    lm_head: str
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A row of the map. `qk_norm` says that the decoder normalises queries and keys (Qwen3)."""

    name: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    text_default: str
    qk_norm: bool = False
    auto_class: str = "AutoModelForImageTextToText"

    def prefixes(self, module: Module, spelling: Spelling | None = None) -> tuple[str, ...]:
        """A module's prefixes in one spelling, or in all of them, sorted. Those of subtrees end in a dot."""
        spellings: tuple[Spelling, ...] = ("checkpoint", "hf", "vllm") if spelling is None else (spelling,)
        found = {p for part in self.parts if part.module == module for one in spellings for p in part.prefixes(one)}
        return tuple(sorted(found))

    def module_of(self, name: str, spelling: Spelling = "hf") -> Module:
        """The one module that a parameter belongs to. Raises UnsupportedModel naming it when none or two match."""
        found = sorted({part.module for part, _ in self._matches(name, spelling)})
        if len(found) != 1:
            where = f"both {' and '.join(found)}" if found else "no module"
            raise UnsupportedModel(f"{self.name}: {name} ({spelling} name) belongs to {where}", param=name)
        return found[0]

    def partition(self, names: Iterable[str], spelling: Spelling = "hf") -> dict[Module, list[str]]:
        """Names by module, in their order; every module is a key. Raises as `module_of`."""
        sorted_names: dict[Module, list[str]] = {module: [] for module in MODULES}
        for name in names:
            sorted_names[self.module_of(name, spelling)].append(name)
        return sorted_names

    def lm_linears(self, names: Iterable[str], spelling: Spelling = "hf") -> list[str]:
        """Paths (no `.weight`) of the decoder's linears that GPTQ quantises and LoRA targets, in order of appearance.

        Takes plain and quantised checkpoints' names; under vLLM's spelling the linears are its fused ones.
        """
        leaves = _PACKED if spelling == "vllm" else _LINEARS
        roots = "|".join(re.escape(p) for part in self.parts if part.decoder for p in part.prefixes(spelling))
        tails = "|".join(f"{block}\\.{leaf}" for block, linears in leaves.items() for leaf in linears)
        pattern = re.compile(rf"((?:{roots})\d+\.(?:{tails}))\.\w+")
        found = (pattern.fullmatch(name) for name in names)
        return list(dict.fromkeys(match[1] for match in found if match))

    def block_of(self, name: str) -> int | None:
        """Number of the tower's block or decoder layer that a parameter (transformers' name) lies in, if in one."""
        for part, prefix in self._matches(name, "hf"):
            if part.blocks is not None and (rest := name.removeprefix(prefix)).startswith(part.blocks):
                number = rest.removeprefix(part.blocks).partition(".")[0]
                return int(number) if number.isdecimal() else None
        return None

    def is_read(self, name: str) -> bool:
        """Whether a parameter (transformers' name) takes part in a forward: what does not can never be trained."""
        return not any(name.removeprefix(prefix).startswith(part.unread) for part, prefix in self._matches(name, "hf"))

    def to_checkpoint(self, hf_name: str, checkpoint_names: Collection[str]) -> str:
        """The name under which the given checkpoint stores what transformers calls `hf_name`.

        Raises UnsupportedModel when the checkpoint has it under no known spelling.
        """
        for part, prefix in self._matches(hf_name, "hf"):
            for spelled in part.checkpoint:
                candidate = spelled + hf_name.removeprefix(prefix)
                if candidate in checkpoint_names:
                    return candidate
        raise UnsupportedModel(f"{self.name}: the checkpoint stores no tensor for {hf_name}", param=hf_name)

    @property
    def gptq_tree(self) -> GptqTree:
        """The decoder as gptqmodel wants it described."""
        decoder = next(part for part in self.parts if part.decoder)
        root = decoder.hf.removesuffix("layers.")
        attention = [f"{leaf}:{int(leaf in _FOLLOWS)}" for leaf in _LINEARS["self_attn"]]
        layer = {
            "input_layernorm": ("input_layernorm:!",),
            "self_attn": (*(("q_norm:!", "k_norm:!") if self.qk_norm else ()), *attention),
            "post_attention_layernorm": ("post_attention_layernorm:!",),
            "mlp": tuple(f"{leaf}:{int(leaf in _FOLLOWS)}" for leaf in _LINEARS["mlp"]),
        }
        outside = [part.hf.rstrip(".") for part in self.parts if not part.decoder and part.hf.startswith("model.")]
        return GptqTree(
            layers_node=decoder.hf.rstrip("."),
            module_tree=(*decoder.hf.rstrip(".").split("."), "#", layer),
            norm=f"{root}norm",
            rotary_embedding=f"{root}rotary_emb",
            lm_head="lm_head",
            outside=(*outside, f"{root}rotary_emb"),
        )

    def _matches(self, name: str, spelling: Spelling) -> list[tuple[Part, str]]:
        """Parts that hold the name, with the prefix that says so, the longest first."""
        found = [
            (part, prefix)
            for part in self.parts
            for prefix in part.prefixes(spelling)
            if name == prefix or (prefix.endswith(".") and name.startswith(prefix))
        ]
        return sorted(found, key=lambda match: -len(match[1]))
