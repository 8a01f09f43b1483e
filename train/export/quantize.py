"""Writes the GPTQ checkpoint that the engine serves.

Comes in: a merged full-precision checkpoint, a checkpoint whose frozen modules it must hold, calibration conversations.
Goes out: a folder with the merged one's own files and tensor names in which each quantised linear's `.weight` has
become four tensors and every other byte is as it was; `config.json` says so in `quantization_config`.
A language model that was frozen is not quantised again: the parent's tensors are taken over, byte for byte.
The solver is gptqmodel's GPTQ; its loader, its layer loop and its saver are not used: they know neither llava nor the
names under which the source spells its tensors.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from noria.errors import IntegrityError, TrainingError, UnsupportedModel
from noria.modules import Architecture, architecture_of
from noria.modules.hashes import module_hashes
from noria.records import MODULES, Json, Module
from noria.settings import QuantizeSettings
from train.export.checkpoint import (
    NewTensor,
    TensorEntry,
    copy_side_files,
    fsync_tree,
    read_bytes,
    rewrite,
    tensor_index,
)
from train.export.gptq_format import quantised_linears
from train.export.layers import QuantisedLinear, quantise_layers
from train.export.rendering import CalibrationSample, encode

FROZEN: tuple[Module, ...] = ("vision_tower", "aligner")
_LINEAR_MULTIPLE = 32  # vLLM's CPU kernel takes no other sizes
_FLOATS = {"F32": "float16", "F16": "float16", "BF16": "bfloat16"}  # stored dtype -> dtype of the scales


@dataclass(frozen=True)
class QuantizeReport:
    """What quantisation did. `frozen` maps each frozen module to the hash of its tensors in the artefact.

    `mean_loss` is GPTQ's squared output error per sample, averaged over linears; None where the language model was
    frozen and the linears are the parent's.
    """

    frozen: dict[str, str]
    quantization: Json
    linears: int
    samples: int
    samples_skipped: int
    tokens: int
    mean_loss: float | None
    seconds: float


def quantize(
    merged: Path,
    source: Path,
    calibration: list[CalibrationSample],
    out: Path,
    settings: QuantizeSettings,
    progress: Callable[[float], None],
    frozen: Collection[Module] = FROZEN,
) -> QuantizeReport:
    """Quantises the language model's linears of `merged` into `out`, which must not exist.

    `source` is the checkpoint whose `frozen` modules `merged` must hold byte for byte: the master, or the parent's
    serving folder. With a frozen language model it must be the latter, and its quantised linears are kept.
    Raises UnsupportedModel for bits or a linear's sizes that the kernels cannot take, IntegrityError when a frozen
    module differs, TrainingError when no calibration sample fits or the solver finds no finite solution.
    """
    started = time.monotonic()
    arch = architecture_of(json.loads((merged / "config.json").read_text()))
    index = tensor_index(merged)
    hashes = _frozen_hashes(arch, index, tensor_index(source), frozen)
    if "language_model" in frozen:
        return _keep_language_model(merged, source, out, arch, hashes, progress)
    _check_kernel(settings)
    model = load_model(merged)
    linears = arch.lm_linears([name for name, _ in model.named_parameters()], "hf")
    names = {linear: arch.to_checkpoint(f"{linear}.weight", index).removesuffix(".weight") for linear in linears}
    _check_sizes(names.values(), index, settings)
    inputs = _inputs(model, merged, calibration, settings)
    scale_dtype = _scale_dtype(names.values(), index)
    solved: dict[str, QuantisedLinear] = {}
    for linear in quantise_layers(model, linears, inputs, settings, scale_dtype, lambda share: progress(0.95 * share)):
        solved[names[linear.name]] = linear
    del model
    quantization = _quantization_config(arch, settings)

    def replace(entry: TensorEntry) -> list[NewTensor] | None:
        linear = solved.get(entry.name.removesuffix(".weight"))
        return None if linear is None else linear.packed.tensors(entry.name.removesuffix(".weight"))

    _write(merged, out, quantization, merged, replace)
    progress(1.0)
    return QuantizeReport(
        frozen=hashes,
        quantization=quantization,
        linears=len(solved),
        samples=len(inputs),
        samples_skipped=len(calibration) - len(inputs),
        tokens=sum(int(one["input_ids"].shape[1]) for one in inputs),
        mean_loss=sum(linear.loss for linear in solved.values()) / len(solved),
        seconds=time.monotonic() - started,
    )


def _keep_language_model(
    merged: Path,
    source: Path,
    out: Path,
    arch: Architecture,
    hashes: dict[str, str],
    progress: Callable[[float], None],
) -> QuantizeReport:
    """The parent's artefact with the modules that were trained in the place of its own."""
    started = time.monotonic()
    index = tensor_index(merged)
    quantization = json.loads((source / "config.json").read_text()).get("quantization_config")
    if quantization is None:
        raise IntegrityError(f"{source} is not quantised, so its language model cannot be kept", param="source")
    trained = {name for m in MODULES if m not in hashes for name in arch.partition(index, spelling="checkpoint")[m]}

    def replace(entry: TensorEntry) -> list[NewTensor] | None:
        if entry.name not in trained:
            return None
        new = index[entry.name]
        return [NewTensor(new.name, new.dtype, new.shape, bytes(read_bytes(new)))]

    _write(merged, out, quantization, source, replace)
    progress(1.0)
    kept = quantised_linears(tensor_index(out))
    return QuantizeReport(hashes, quantization, len(kept), 0, 0, 0, None, time.monotonic() - started)


def load_model(folder: Path, dtype: str | None = None) -> Any:
    """The checkpoint in transformers, on the GPU where there is one (stored dtype), else on the CPU (float32)."""
    import torch
    from transformers import AutoModelForImageTextToText

    on_gpu = torch.cuda.is_available()
    wanted = dtype or ("auto" if on_gpu else "float32")
    model: Any = AutoModelForImageTextToText.from_pretrained(  # nosec B615
        folder, dtype=wanted, trust_remote_code=False, local_files_only=True
    )
    return model.to("cuda" if on_gpu else "cpu").eval()


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)  # nosec B615


def to_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, pictures in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def _frozen_hashes(
    arch: Architecture, merged: Mapping[str, TensorEntry], source: Mapping[str, TensorEntry], frozen: Collection[Module]
) -> dict[str, str]:
    """Hashes of the frozen modules' tensors in `source`, once those that are not quantised are the merged model's."""
    hashes = module_hashes(arch, source, frozen)
    unquantised = [module for module in hashes if module != "language_model"]
    for module, made in module_hashes(arch, merged, unquantised).items():
        if made != hashes[module]:
            raise IntegrityError(f"the merged model's {module} is not that of its source, although it is frozen")
    return {module: hashes[module] for module in MODULES if module in hashes}


def _check_kernel(settings: QuantizeSettings) -> None:
    import torch

    if settings.bits != 4 and not torch.cuda.is_available():
        raise UnsupportedModel(
            f"train.quantize.bits={settings.bits} cannot be served on a CPU: vLLM's kernel there takes 4",
            param="train.quantize.bits",
        )


def _check_sizes(linears: Any, index: Mapping[str, TensorEntry], settings: QuantizeSettings) -> None:
    for linear in linears:
        entry = index[f"{linear}.weight"]
        outputs, inputs = entry.shape
        if entry.dtype not in _FLOATS:
            raise UnsupportedModel(f"{entry.name} is {entry.dtype}; full precision is needed to quantise it")
        if inputs % settings.group_size or inputs % _LINEAR_MULTIPLE or outputs % _LINEAR_MULTIPLE:
            raise UnsupportedModel(
                f"{entry.name} is {outputs}x{inputs}: its inputs must be a multiple of train.quantize.group_size="
                f"{settings.group_size} and both sizes of {_LINEAR_MULTIPLE}",
                param="train.quantize.group_size",
            )


def _inputs(
    model: Any, folder: Path, calibration: list[CalibrationSample], settings: QuantizeSettings
) -> list[dict[str, Any]]:
    processor = load_processor(folder)
    encoded = (encode(processor, sample, settings.calibration_tokens) for sample in calibration)
    inputs = [to_device(one, model) for one in encoded if one is not None]
    if not inputs:
        raise TrainingError(
            f"none of {len(calibration)} calibration conversations fits in train.quantize.calibration_tokens="
            f"{settings.calibration_tokens}",
            param="train.quantize.calibration_tokens",
        )
    return inputs


def _scale_dtype(linears: Any, index: Mapping[str, TensorEntry]) -> Any:
    import torch

    dtypes = {_FLOATS[index[f"{linear}.weight"].dtype] for linear in linears}
    return torch.bfloat16 if dtypes == {"bfloat16"} else torch.float16


def _quantization_config(arch: Architecture, settings: QuantizeSettings) -> Json:
    """What vLLM, transformers and gptqmodel read. `dynamic` keeps loaders away from tower, aligner and output layer.

    vLLM finds the quantised linears by their tensors (its `modules_in_block_to_quantize` matches substrings, so that
    a name like `self_attn.q_proj` would also hit the tower's; it is left out for that reason).
    """
    skipped = sorted({prefix for module in FROZEN for prefix in arch.prefixes(module)})
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "damp_percent": settings.damp,
        "dynamic": {f"-:^{re.escape(prefix)}": {} for prefix in skipped},
        "meta": {"quantizer": [f"gptqmodel:{version('gptqmodel')}"]},
    }


def _write(
    merged: Path,
    out: Path,
    quantization: Json,
    tensors_of: Path,
    replace: Callable[[TensorEntry], list[NewTensor] | None],
) -> None:
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_side_files(merged, staging)
    config = json.loads((merged / "config.json").read_text())
    (staging / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n")
    rewrite(tensors_of, staging, replace)
    fsync_tree(staging)
    staging.rename(out)
