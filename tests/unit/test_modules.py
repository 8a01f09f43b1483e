"""The module map against tiny random models of every family, vLLM's own name mappers, and the hub's spellings."""

from __future__ import annotations

import importlib
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from noria.errors import UnsupportedModel
from noria.modules import ARCHITECTURES, Architecture, architecture_of
from noria.records import MODULES, Module
from tests.tiny_families import FAMILIES, random_model

ALIGNER_STEMS = {  # every tensor of the aligner starts with one of these, and each of these holds one
    "llava": {"model.multi_modal_projector"},
    "llava_next": {"model.multi_modal_projector", "model.image_newline"},
    "llava_onevision": {"model.multi_modal_projector", "model.image_newline"},
    "qwen2_vl": {"model.visual.merger"},
    "qwen2_5_vl": {"model.visual.merger"},
    "qwen3_vl": {"model.visual.merger", "model.visual.deepstack_merger_list"},
    "internvl": {"model.multi_modal_projector"},
    "idefics3": {"model.connector"},
    "smolvlm": {"model.connector"},
}
HUB_NAMES: dict[str, dict[str, Module]] = {  # as the hub's checkpoints spell them
    "llava": {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": "vision_tower",
        "vision_tower.vision_model.pre_layrnorm.weight": "vision_tower",
        "multi_modal_projector.linear_1.weight": "aligner",
        "language_model.model.layers.0.self_attn.q_proj.weight": "language_model",
        "language_model.model.embed_tokens.weight": "language_model",
        "language_model.lm_head.weight": "language_model",
    },
    "llava_next": {"image_newline": "aligner", "language_model.model.norm.weight": "language_model"},
    "llava_onevision": {"vision_tower.vision_model.post_layernorm.bias": "vision_tower", "image_newline": "aligner"},
    "qwen2_vl": {
        "visual.patch_embed.proj.weight": "vision_tower",
        "visual.blocks.1.attn.qkv.bias": "vision_tower",
        "visual.merger.mlp.0.weight": "aligner",
        "model.layers.0.self_attn.q_proj.bias": "language_model",
        "lm_head.weight": "language_model",
    },
    "qwen2_5_vl": {"visual.merger.ln_q.weight": "aligner", "model.embed_tokens.weight": "language_model"},
    "qwen3_vl": {
        "model.visual.pos_embed.weight": "vision_tower",
        "model.visual.deepstack_merger_list.0.norm.weight": "aligner",
        "model.language_model.layers.0.self_attn.q_norm.weight": "language_model",
    },
    "internvl": {
        "vision_tower.encoder.layer.0.lambda_1": "vision_tower",
        "multi_modal_projector.layer_norm.weight": "aligner",
        "language_model.model.layers.0.self_attn.k_norm.weight": "language_model",
    },
    "idefics3": {
        "model.vision_model.embeddings.position_embedding.weight": "vision_tower",
        "model.connector.modality_projection.proj.weight": "aligner",
        "model.text_model.norm.weight": "language_model",
    },
    "smolvlm": {"model.connector.modality_projection.proj.weight": "aligner", "lm_head.weight": "language_model"},
}
VLLM_CLASSES = {
    "llava": ("llava", "LlavaForConditionalGeneration"),
    "llava_next": ("llava_next", "LlavaNextForConditionalGeneration"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "internvl": ("interns1", "InternS1ForConditionalGeneration"),
    "idefics3": ("idefics3", "Idefics3ForConditionalGeneration"),
    "smolvlm": ("smolvlm", "SmolVLMForConditionalGeneration"),
}


def names_in(folder: Path) -> list[str]:
    """Tensor names of a checkpoint folder with one file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    """The family's tiny model."""
    return random_model(family)


@pytest.fixture(scope="module")
def arch(model: Any) -> Architecture:
    """The family's row, looked up as a checkpoint's config.json would be."""
    return architecture_of({**model.config.to_dict(), "architectures": [type(model).__name__]})


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names that transformers writes when it saves the model."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return names_in(folder)


def test_every_parameter_has_one_module(family: str, model: Any, arch: Architecture) -> None:
    names = [name for name, _ in model.named_parameters()]
    parted = arch.partition(names)
    assert sorted(chain.from_iterable(parted.values())) == sorted(names)
    assert all(parted[module] for module in MODULES)
    assert {_stem(name, ALIGNER_STEMS[family]) for name in parted["aligner"]} == ALIGNER_STEMS[family]
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    owners = {name for name, weight in model.named_parameters() if id(weight) in embeddings}
    assert owners <= set(parted["language_model"])
    assert len(owners) == len(embeddings) == 2
    buffers = [name for name in model.state_dict() if name not in set(names)]
    assert sum(len(found) for found in arch.partition(buffers).values()) == len(buffers)


def _stem(name: str, stems: set[str]) -> str:
    return next((stem for stem in stems if name == stem or name.startswith(stem + ".")), name)


def test_modules_are_whole_subtrees_of_the_model(family: str, model: Any, arch: Architecture) -> None:
    """The tower, asked of the model itself: transformers knows where its picture features come from."""
    inner = model.model
    tower = next(getattr(inner, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(inner, name))
    text = next(getattr(inner, name) for name in ("language_model", "text_model") if hasattr(inner, name))
    ids = {id(weight): name for name, weight in model.named_parameters()}
    assert {arch.module_of(ids[id(w)]) for w in text.parameters()} == {"language_model"}
    inside = {arch.module_of(ids[id(w)]) for name, w in tower.named_parameters() if "merger" not in name}
    assert inside == {"vision_tower"}


def test_tied_embeddings_stay_in_the_language_model(family: str) -> None:
    tied = random_model(family, tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    parted = architecture_of(tied.config.to_dict()).partition(name for name, _ in tied.named_parameters())
    assert [name for name in parted["language_model"] if "embed_tokens" in name or "lm_head" in name] == [
        next(name for name, weight in tied.named_parameters() if weight is tied.get_input_embeddings().weight)
    ]


def test_decoder_linears_and_nothing_else(model: Any, arch: Architecture) -> None:
    from torch import nn

    linears = arch.lm_linears(name for name, _ in model.named_parameters())
    tree = arch.gptq_tree
    layers = model.get_submodule(tree.layers_node)
    expected = [
        f"{tree.layers_node}.{path}" for path, module in layers.named_modules() if isinstance(module, nn.Linear)
    ]
    assert len(expected) == 2 * 7
    assert sorted(linears) == sorted(expected)
    assert linears == arch.lm_linears(f"{linear}.{part}" for linear in linears for part in ("qweight", "g_idx"))


def test_gptq_tree_names_what_is_there(model: Any, arch: Architecture) -> None:
    tree = arch.gptq_tree
    *path, marker, layer = tree.module_tree
    assert (".".join(path), marker) == (tree.layers_node, "#")
    ordered = [f"{block}.{leaf}" for block, leaves in layer.items() for leaf in leaves if "norm" not in block]
    quantised = sorted(leaf.split(":")[0] for leaf in ordered if not leaf.endswith("!"))
    first = model.get_submodule(f"{tree.layers_node}.0")
    found = arch.lm_linears(name for name, _ in model.named_parameters())
    assert quantised == sorted(name.removeprefix(f"{tree.layers_node}.0.") for name in found if ".0." in name)
    assert {name.split(".")[0] for name, _ in first.named_parameters()} == set(layer)
    assert arch.qk_norm == hasattr(first.self_attn, "q_norm")
    assert ("q_norm:!" in layer["self_attn"]) == arch.qk_norm
    for name in (tree.norm, tree.rotary_embedding, tree.lm_head, *tree.outside):
        owner, _, leaf = name.rpartition(".")
        assert hasattr(model.get_submodule(owner), leaf), name


def test_blocks_are_numbered_and_what_is_never_read_is_known(family: str, model: Any, arch: Architecture) -> None:
    """Two blocks in the tower and two layers in the decoder; only LLaVA's towers keep a norm they never use."""
    blocks: dict[Module, set[int | None]] = {module: set() for module in MODULES}
    for name, _ in model.named_parameters():
        blocks[arch.module_of(name)].add(arch.block_of(name))
    assert blocks == {"vision_tower": {None, 0, 1}, "aligner": {None}, "language_model": {None, 0, 1}}
    unread = {name for name, _ in model.named_parameters() if not arch.is_read(name)}
    norms = {f"model.vision_tower.post_layernorm.{leaf}" for leaf in ("weight", "bias")}
    assert unread == (norms if family.startswith("llava") else set())


def test_saved_names_sort_alike_and_can_be_found(model: Any, arch: Architecture, saved: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    by_hf, by_file = arch.partition(names), arch.partition(saved, "checkpoint")
    assert {module: len(found) for module, found in by_hf.items()} == {m: len(found) for m, found in by_file.items()}
    for module in MODULES:
        assert sorted(arch.to_checkpoint(name, saved) for name in by_hf[module]) == sorted(by_file[module])
    assert len(arch.lm_linears(saved, "checkpoint")) == len(arch.lm_linears(names))


def test_hub_names(family: str, arch: Architecture) -> None:
    for name, module in HUB_NAMES[family].items():
        assert arch.module_of(name, "checkpoint") == module, name


def test_the_hub_spelling_is_found_first(tiny_vlm: Path) -> None:
    names = names_in(tiny_vlm)
    row = next(row for row in ARCHITECTURES if "llava" in row.model_types)
    assert row.to_checkpoint("model.vision_tower.pre_layrnorm.bias", names) == (
        "vision_tower.vision_model.pre_layrnorm.bias"
    )
    assert row.to_checkpoint("lm_head.weight", names) == "language_model.lm_head.weight"
    with pytest.raises(UnsupportedModel, match=r"model\.language_model\.layers\.9\.mlp\.up_proj\.weight"):
        row.to_checkpoint("model.language_model.layers.9.mlp.up_proj.weight", names)


def test_vllm_names_sort_as_vllm_itself_maps_them(family: str, arch: Architecture, saved: list[str]) -> None:
    module_name, class_name = VLLM_CLASSES[family]
    cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module_name}"), class_name)
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    for name in [*saved, *HUB_NAMES[family]]:
        mapped = mapper.map_name(name) if mapper is not None else name
        assert arch.module_of(mapped, "vllm") == arch.module_of(name, "checkpoint"), (name, mapped)
    decoder = next(part.vllm for part in arch.parts if part.decoder)
    fused = [f"{decoder}0.{linear}" for linear in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    assert arch.lm_linears([f"{linear}.qweight" for linear in fused], "vllm") == fused


def test_vllm_sees_the_same_three_modules(family: str, arch: Architecture) -> None:
    """vLLM's own split, where it has one: its tower holds mergers too, so they are taken out by its connector."""
    module_name, class_name = VLLM_CLASSES[family]
    cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module_name}"), class_name)
    if not hasattr(cls, "get_mm_mapping"):
        assert family == "llava_onevision"
        return
    split = cls.get_mm_mapping(cls)
    kinds: dict[Module, list[str]] = {
        "language_model": split.language_model,
        "aligner": split.connector,
        "vision_tower": split.tower_model,
    }
    for module, roots in kinds.items():
        for prefix in arch.prefixes(module, "vllm"):
            if prefix not in ("image_newline", "lm_head."):  # vLLM names subtrees it adapts, not these two
                assert any(prefix.startswith(root.rstrip(".")) for root in roots), (module, prefix, roots)


def test_an_unknown_parameter_is_named(arch: Architecture) -> None:
    for name in ("model.audio_tower.conv1.weight", "vision_towers.x", "my.model.visual.blocks.0.x", "lm_header.weight"):
        for spelling in ("hf", "vllm", "checkpoint"):
            with pytest.raises(UnsupportedModel, match=name) as error:
                arch.module_of(name, spelling)
            assert error.value.param == name


def test_no_two_modules_share_a_prefix() -> None:
    for row in ARCHITECTURES:
        for spelling in ("hf", "vllm", "checkpoint"):
            owners = {prefix: module for module in MODULES for prefix in row.prefixes(module, spelling)}
            for prefix in owners:
                assert row.module_of(prefix + ("0.x" if prefix.endswith(".") else ""), spelling) == owners[prefix]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "blip-2"}, "LlavaForConditionalGeneration"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlamaForCausalLM"),
        ({"model_type": "llava", "text_config": {"model_type": "phi"}}, "'phi' language model"),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen3_moe"}}, "'qwen3_moe' language model"),
        ({}, "model_type=None"),
    ],
)
def test_what_is_not_in_the_map_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        architecture_of(config)


def test_old_files_without_a_text_config_are_known() -> None:
    assert architecture_of({"model_type": "qwen2_vl", "hidden_size": 32}).name == "Qwen2-VL"
    assert architecture_of({"architectures": ["SmolVLMForConditionalGeneration"]}).name == "Idefics3 / SmolVLM"
    assert architecture_of({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl"}}).qk_norm is False


def test_the_table_imports_nothing_heavy() -> None:
    code = "import sys, noria.modules; print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
