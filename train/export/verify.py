"""Reads the artefact back from disk and compares it with the model that it stands for.

Comes in: the serving folder, the merged checkpoint, held-out conversations. Goes out: a report and `probe.json`.
Two proofs together make the artefact's model: every tensor that is not quantised has the merged one's bytes, and the
quantised linears, dequantised from the file, are put into the merged model and measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.errors import TrainingError
from noria.modules import architecture_of
from noria.modules.hashes import tensor_hash
from noria.settings import VerifySettings
from train.export.checkpoint import TensorEntry, tensor_index
from train.export.gptq_format import (
    SUFFIXES,
    dequantise,
    expected_shapes,
    format_of,
    quantised_linears,
    read_packed,
)
from train.export.probe import write_probe
from train.export.quantize import load_model, load_processor, to_device
from train.export.rendering import CalibrationSample, encode, image_token_id

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 1024


@dataclass(frozen=True)
class VerifyReport:
    """What was measured. KL(merged || artefact) in nats per token, over every text token of the held-out conversations.

    `agreement` is the share of tokens at which both models rank the same token first; `max_kl` is one token's.
    """

    mean_kl: float
    max_kl: float
    agreement: float
    tokens: int
    samples: int
    tensors: int
    quantised: int
    probe_prompts: int
    seconds: float


def verify(
    serving: Path,
    merged: Path,
    samples: list[CalibrationSample],
    out_probe: Path,
    settings: VerifySettings,
    check: Callable[[], None] = lambda: None,
) -> VerifyReport:
    """Proves the artefact or raises TrainingError: a tensor missing, of a wrong shape or dtype, changed without being
    quantised, not finite; or the mean KL above `settings.max_kl`. `check` is called per conversation and may raise.
    """
    import torch

    started = time.monotonic()
    bits, _, v1 = format_of(json.loads((serving / "config.json").read_text())["quantization_config"])
    index, linears = check_tensors(serving, merged)
    model, processor = load_model(merged), load_processor(serving)
    weights = _meant_weights(model, merged, index, linears, bits, v1)
    inputs = [one for sample in samples[: settings.samples] if (one := encode(processor, sample, MAX_TOKENS))]
    if not inputs:
        raise TrainingError("no held-out conversation to verify on", param="train.verify.samples")
    measured = []
    with torch.no_grad():
        for one in inputs:
            check()
            measured.append(_compare(model, weights, to_device(one, model), image_token_id(processor)))
        with _swapped(model, weights):
            prompts = write_probe(model, processor, out_probe, settings.probe_tolerance)
    kl_T = torch.cat([kl for kl, _ in measured])
    same_T = torch.cat([same for _, same in measured])
    mean_kl = float(kl_T.mean())
    if not mean_kl <= settings.max_kl:
        raise TrainingError(
            f"the quantised model is too far from the merged one: mean KL {mean_kl:.4f} nats per token over "
            f"{len(kl_T)} tokens, bound train.verify.max_kl={settings.max_kl}",
            param="train.verify.max_kl",
        )
    return VerifyReport(
        mean_kl=mean_kl,
        max_kl=float(kl_T.max()),
        agreement=float(same_T.float().mean()),
        tokens=len(kl_T),
        samples=len(inputs),
        tensors=len(index),
        quantised=len(linears),
        probe_prompts=len(prompts),
        seconds=time.monotonic() - started,
    )


def check_tensors(serving: Path, merged: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """The artefact's index and its quantised linears, once every tensor is accounted for.

    Raises TrainingError that names the first offenders. Tower and aligner are covered: their bytes must be the same.
    """
    config = json.loads((serving / "config.json").read_text())["quantization_config"]
    bits, group_size, _ = format_of(config)
    index, before = tensor_index(serving), tensor_index(merged)
    linears = quantised_linears(index)
    arch = architecture_of(json.loads((merged / "config.json").read_text()))
    expected = set(arch.lm_linears(before, "checkpoint"))
    wrong = [f"{name} is not quantised" for name in sorted(expected - set(linears))]
    wrong += [f"{name} must not be quantised" for name in sorted(set(linears) - expected)]
    wanted: set[str] = {name for name in before if name.removesuffix(".weight") not in expected}
    for linear in sorted(expected & set(linears)):
        shapes = expected_shapes(before[f"{linear}.weight"].shape, bits, group_size)
        wanted |= {f"{linear}.{suffix}" for suffix in SUFFIXES}
        wrong += _wrong_parts(index, linear, shapes)
    wrong += [f"{name} is missing" for name in sorted(wanted - set(index))]
    wrong += [f"{name} is unexpected" for name in sorted(set(index) - wanted)]
    same = sorted(wanted & set(before) & set(index))
    wrong += [f"{name} was changed" for name in same if tensor_hash(index[name]) != tensor_hash(before[name])]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise TrainingError(f"the quantised checkpoint in {serving} is wrong: {'; '.join(wrong[:5])}{more}")
    return index, linears


def _wrong_parts(index: Mapping[str, TensorEntry], linear: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    wrong = []
    for suffix, shape in shapes.items():
        entry = index.get(f"{linear}.{suffix}")
        dtypes = ("F16", "BF16") if suffix == "scales" else ("I32",)
        if entry is not None and (entry.shape != shape or entry.dtype not in dtypes):
            wrong.append(f"{entry.name} is {entry.dtype}{list(entry.shape)}, not {'/'.join(dtypes)}{list(shape)}")
    return wrong


def _meant_weights(
    model: Any, merged: Path, index: Mapping[str, TensorEntry], linears: list[str], bits: int, v1: bool
) -> dict[str, torch.Tensor]:
    """What the artefact's packed tensors mean, under the model's own parameter names."""
    import torch

    arch = architecture_of(json.loads((merged / "config.json").read_text()))
    before = tensor_index(merged)
    parameters = dict(model.named_parameters())
    weights = {}
    for linear in arch.lm_linears(parameters, "hf"):
        name = f"{linear}.weight"
        stored = arch.to_checkpoint(name, before).removesuffix(".weight")
        weight = dequantise(read_packed(index, stored), bits, v1)
        if not bool(torch.isfinite(weight).all()):
            raise TrainingError(f"{stored} dequantises to numbers that are not finite")
        weights[name] = weight.to(parameters[name].device, parameters[name].dtype)
    if len(weights) != len(linears):
        raise TrainingError(f"{len(linears)} linears are quantised, the model has {len(weights)} to put them in")
    return weights


@contextmanager
def _swapped(model: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with other weights for a while; only pointers change."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight
        yield
    finally:
        for name, weight in kept.items():
            parameters[name].data = weight


def _compare(
    model: Any, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, Any], image_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per text token of one conversation: KL(merged || artefact), and whether both rank the same token first."""
    import torch

    text_T = inputs["input_ids"][0, 1:] != image_token
    merged_TV = torch.log_softmax(model(**inputs, use_cache=False).logits[0, :-1][text_T].float(), dim=-1)
    with _swapped(model, weights):
        served_TV = torch.log_softmax(model(**inputs, use_cache=False).logits[0, :-1][text_T].float(), dim=-1)
    if not bool(torch.isfinite(merged_TV).all() and torch.isfinite(served_TV).all()):
        raise TrainingError("the merged or the quantised model computes numbers that are not finite")
    kl_T = (merged_TV.exp() * (merged_TV - served_TV)).sum(-1)
    return kl_T.cpu(), (merged_TV.argmax(-1) == served_TV.argmax(-1)).cpu()
