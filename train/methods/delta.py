"""A delta: what one training changed, as a folder, and how it is put on the model that it was trained from.

Comes in: a trained model, or delta folders, oldest first. Goes out: a delta folder; changed weights.
A delta folder holds what was trained and nothing else:
- `adapter_config.json`, `adapter_model.safetensors`: a plain LoRA in peft's format, on linears of any module, named in
  full; it adds s B A to a weight, with s = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (Kalajdzievski
  2023, https://arxiv.org/abs/2312.03732);
- `full.safetensors`: parameters that were trained in full, under transformers' names; they replace;
- `modules.json`: each module's policy. A tensor of a module that is frozen there is an error, not a change.
An `adapter/` is one such folder, or holds several as `01-NAME/`, `02-NAME/`, which apply in that order.
Shape suffixes: O, I are a linear's output and input features, R a LoRA's rank.
Must not import transformers or peft, and torch inside functions only: the daemon that waits stays small.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import TrainingError
from noria.module_settings import ResolvedPolicy
from noria.modules import Architecture, architecture_of
from noria.records import MODULES, Json, Module
from train.export.checkpoint import TensorEntry, file_index, fsync_tree
from train.export.gptq_format import to_torch

if TYPE_CHECKING:
    import torch

LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FULL, POLICIES = "full.safetensors", "modules.json"
_ORDERED = re.compile(r"\d\d-.+")
_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_REFUSED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "trainable_token_indices")
_BEFORE = {"language_model": {"policy": "lora"}}  # a folder without modules.json: an adapter of the language model


@dataclass(frozen=True)
class Factors:
    """One LoRA's part in one weight: scale * B A. `lora_a_RI` and `lora_b_OR` are where the factors lie."""

    lora_a_RI: TensorEntry
    lora_b_OR: TensorEntry
    scale: float


@dataclass(frozen=True)
class Change:
    """What a row of deltas does to one parameter: `full`, if there is one, replaces it, then `factors` are added."""

    full: TensorEntry | None
    factors: tuple[Factors, ...]

    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes of the parameters that its parts fit; one, where all is well."""
        fit: set[tuple[int, ...]] = {(one.lora_b_OR.shape[0], one.lora_a_RI.shape[1]) for one in self.factors}
        return fit if self.full is None else {*fit, self.full.shape}


@dataclass(frozen=True)
class Delta:
    """One folder, read: policies by module, and by a parameter's name what it holds for it."""

    policies: Mapping[Module, Json]
    full: Mapping[str, TensorEntry]
    lora: Mapping[str, Factors]


def delta_folders(*adapters: Path) -> tuple[Path, ...]:
    """The delta folders of one or more `adapter/` folders, in the order in which they apply.

    Raises TrainingError for a folder that is neither a delta nor holds some, or is both.
    """
    found: list[Path] = []
    for adapter in adapters:
        inside = sorted(path for path in adapter.glob("*") if path.is_dir() and _ORDERED.fullmatch(path.name))
        itself = any((adapter / name).is_file() for name in (LORA, FULL))
        if bool(inside) == itself:
            what = "both a delta and a folder of deltas" if itself else "no delta folder"
            raise TrainingError(f"{adapter} is {what}: it should hold {LORA} or {FULL}, or folders 01-NAME, 02-NAME")
        found += [adapter] if itself else inside
    return tuple(found)


def read_policies(folder: Path) -> dict[Module, Json]:
    """Every module's policy in one delta: `{"policy": "frozen" | "full" | "lora", ...}`."""
    path = folder / POLICIES
    said = json.loads(path.read_text()) if path.is_file() else _BEFORE
    return {module: said.get(module, {"policy": "frozen"}) for module in MODULES}


def changed_modules(folders: Iterable[Path]) -> tuple[Module, ...]:
    """The modules that any of these deltas trained, in the order of `MODULES`."""
    trained = {m for folder in folders for m, told in read_policies(folder).items() if told["policy"] != "frozen"}
    return tuple(module for module in MODULES if module in trained)


def read_delta(folder: Path, architecture: Architecture) -> Delta:
    """One delta folder, its names and shapes checked among themselves; the tensors stay on disk.

    Raises TrainingError when the adapter is no plain LoRA, or a tensor belongs to a module with another policy.
    """
    policies = read_policies(folder)
    full = file_index(folder / FULL) if (folder / FULL).is_file() else {}
    lora = _read_lora(folder) if (folder / LORA).is_file() else {}
    both = sorted(full.keys() & lora.keys())
    if both:
        raise TrainingError(f"the delta in {folder} both replaces and adapts {both[0]}")
    if not (folder / POLICIES).is_file():
        _require_language_model(folder, [*lora, *full], architecture)
    for policy, names in (("full", full), ("lora", lora)):
        for name in names:
            module = architecture.module_of(name)
            if policies[module]["policy"] != policy:
                raise TrainingError(
                    f"the delta in {folder} holds {name} as {policy}, but its {POLICIES} says that "
                    f"{module} is {policies[module]['policy']}"
                )
    return Delta(policies, full, lora)


def changes(folders: Iterable[Path], architecture: Architecture) -> dict[str, Change]:
    """What the deltas do together, by parameter name: the last replacement, and the LoRAs that came after it."""
    together: dict[str, Change] = {}
    for folder in delta_folders(*folders):
        delta = read_delta(folder, architecture)
        together.update({name: Change(entry, ()) for name, entry in delta.full.items()})
        for name, factors in delta.lora.items():
            before = together.get(name, Change(None, ()))
            together[name] = Change(before.full, (*before.factors, factors))
    return together


def changed_weight(name: str, weight: torch.Tensor, change: Change) -> tuple[torch.Tensor, float]:
    """The parameter after its change, in its own dtype, and the largest absolute change before rounding.

    W' = round(F + sum_i s_i B_i A_i), F being W or its replacement; the sum is in float32 and rounded once. Raises
    TrainingError for another shape or a number that is not finite.
    """
    import torch

    for shape in change.shapes() - {tuple(weight.shape)}:
        raise TrainingError(f"a delta's {name} is {list(shape)}, the model's is {list(weight.shape)}")
    start = weight.float() if change.full is None else to_torch(change.full).to(weight.device).float()
    update = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for one in change.factors:
        a_RI, b_OR = (to_torch(factor).to(weight.device).float() for factor in (one.lora_a_RI, one.lora_b_OR))
        update += (b_OR @ a_RI) * one.scale
    exact = start + update if change.factors else start
    if not bool(torch.isfinite(exact).all()):
        raise TrainingError(f"the deltas' update of {name} is not finite")
    moved = update if change.full is None else exact - weight.float()
    return exact.to(weight.dtype), float(moved.abs().max())


def apply_deltas(model: Any, folders: Sequence[Path]) -> None:
    """Changes a loaded transformers model (not wrapped by peft) in place, as `train.export.merge` changes its files.

    `folders` are delta folders, or folders of delta folders, oldest first. Raises TrainingError where one fits no
    parameter of the model.
    """
    import torch

    parameters = dict(model.named_parameters())
    for name, change in changes(folders, model_architecture(model)).items():
        if name not in parameters:
            raise TrainingError(f"a delta changes {name}, which {type(model).__name__} does not have")
        with torch.no_grad():
            parameters[name].copy_(changed_weight(name, parameters[name].data, change)[0])


def save_delta(
    model: Any,
    out: Path,
    modules: Mapping[Module, ResolvedPolicy | Mapping[str, Any] | str],
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes what was trained to `out`, which appears whole or not at all; the same weights give the same bytes.

    `model` is a transformers model or peft's around one. Trained are its LoRA factors (adapter `default`, stored as
    float32) and every other parameter with `requires_grad`, stored in its own dtype or in `dtype`. `modules` maps each
    module to its policy: resolved, or a mapping with a `policy`, or that word alone; what is left out is frozen.
    `state` gives values by the model's own parameter names where the model holds only shards of them.
    Raises TrainingError when what was trained is not what the policies say, or is not finite.
    """
    policies = {module: _told(modules.get(module, "frozen")) for module in MODULES}
    lora, full = _trained(model, state or {})
    _require_policies(model_architecture(model), policies, lora, full)
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / POLICIES).write_text(json.dumps(policies, indent=2, sort_keys=True, default=str) + "\n")
    if lora:
        config = _lora_config(model, sorted(lora))
        (staging / LORA_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        sides = {f"base_model.model.{n}.lora_{side}.weight": t for n, ab in lora.items() for side, t in ab.items()}
        _save(staging / LORA, {name: tensor.float() for name, tensor in sides.items()})
    if full:
        _save(staging / FULL, {name: tensor.to(dtype or tensor.dtype) for name, tensor in full.items()})
    fsync_tree(staging)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


def model_architecture(model: Any) -> Architecture:
    """A loaded model's row in the module map; peft's wrapper is looked through."""
    return architecture_of({**_inner(model).config.to_dict(), "architectures": None})


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _told(policy: ResolvedPolicy | Mapping[str, Any] | str) -> Json:
    if isinstance(policy, str):
        return {"policy": policy}
    return policy.record() if isinstance(policy, ResolvedPolicy) else dict(policy)


def _trained(
    model: Any, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """LoRA factors by linear and side, and parameters trained in full, on the CPU, under transformers' names."""
    lora: dict[str, dict[str, torch.Tensor]] = {}
    full: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.").split(".")
        kind = next((part for part in path if part.startswith("lora_")), None)
        if kind is None and not parameter.requires_grad:
            continue
        value = state.get(name, parameter).detach().cpu().contiguous()
        if kind is None:
            full[".".join(part for part in path if part != "base_layer")] = value
        elif path[-3] in ("lora_A", "lora_B") and path[-2:] == ["default", "weight"]:
            lora.setdefault(".".join(path[:-3]), {})[path[-3].removeprefix("lora_")] = value
        elif parameter.requires_grad:
            raise TrainingError(f"{name} was trained, but a delta holds plain LoRA and whole parameters only")
    return lora, full


def _require_policies(
    architecture: Architecture, policies: Mapping[Module, Json], lora: Iterable[str], full: Iterable[str]
) -> None:
    trained: dict[Module, dict[str, str]] = {module: {} for module in MODULES}
    for kind, names in (("lora", (f"{linear}.weight" for linear in lora)), ("full", full)):
        for name in names:
            trained[architecture.module_of(name)].setdefault(kind, name)
    for module, kinds in trained.items():
        policy = policies[module]["policy"]
        for kind, name in kinds.items():
            if kind != policy:
                raise TrainingError(f"{name} was trained ({kind}), but {module} is {policy}", code="not_frozen")
        if policy != "frozen" and not kinds:
            raise TrainingError(f"{module} is {policy}, but nothing of it was trained")


def _lora_config(model: Any, linears: Sequence[str]) -> Json:
    """peft's settings, each linear with its own name, rank and alpha.

    peft shortens the list of targets and keeps it as a set, whose order changes from process to process.
    """
    config: Json = model.peft_config["default"].to_dict()
    wrong = [key for key in _REFUSED if config.get(key)]
    if wrong or config.get("bias", "none") != "none":
        raise TrainingError(f"a delta holds plain LoRA only, not {', '.join(wrong) or 'trained biases'}")
    layers = {linear: _inner(model).get_submodule(linear) for linear in linears}
    ranks = {re.escape(n): layer.r["default"] for n, layer in layers.items()}
    alphas = {re.escape(n): layer.lora_alpha["default"] for n, layer in layers.items()}
    config.update(
        target_modules=list(linears),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config["r"]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]},
        base_model_name_or_path=None,
        inference_mode=True,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    import torch
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{name} was trained to numbers that are not finite", code="not_finite")
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})


def _require_language_model(folder: Path, weights: Iterable[str], architecture: Architecture) -> None:
    for weight in weights:
        if not architecture.lm_linears([weight]):
            linear = weight.removesuffix(".weight")
            raise TrainingError(f"the adapter in {folder} changes {linear}, which is no linear of the language model")


def _read_lora(folder: Path) -> dict[str, Factors]:
    config = json.loads((folder / LORA_CONFIG).read_text())
    wrong = [key for key in _REFUSED if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or wrong:
        raise TrainingError(f"the adapter in {folder} is not a plain LoRA ({', '.join(wrong) or 'type or bias'})")
    factors: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in file_index(folder / LORA).items():
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            raise TrainingError(f"the adapter in {folder} has a tensor that no LoRA linear explains: {name}")
        factors.setdefault(match["linear"], {})[match["side"]] = entry
    return {f"{linear}.weight": _factors(linear, sides, config) for linear, sides in factors.items()}


def _factors(linear: str, sides: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Factors:
    if set(sides) != {"A", "B"}:
        raise TrainingError(f"the adapter holds only half of {linear}: lora_{', '.join(sides)}")
    rank = _pattern(config.get("rank_pattern"), linear, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), linear, config["lora_alpha"])
    a, b = sides["A"], sides["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise TrainingError(f"the adapter's {linear} is {list(b.shape)} by {list(a.shape)} at rank {rank}")
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, linear: str, default: Any) -> Any:
    """A value of peft's `rank_pattern` or `alpha_pattern`: the first whose regex ends the linear's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"^(.*\.)?({pattern})$", linear):
            return value
    return default
