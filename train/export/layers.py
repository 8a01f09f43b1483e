"""GPTQ over a decoder, layer by layer, with gptqmodel's own solver.

Comes in: a loaded transformers model, the names of its linears, calibration inputs. Goes out: packed linears, in order.
Each layer sees what the already quantised layers before it put out, and inside a layer each group of linears sees the
quantised groups before it (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, section 3.3). Linears that read the
same tensor (q, k, v; gate, up) share one Hessian and are solved as one: GPTQ treats every output row by itself, so
stacking rows changes nothing but the time.
What a model does to the stream between two layers (Qwen3-VL adds picture features there) is recorded once, in full
precision, as a difference and added again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from noria.errors import TrainingError, UnsupportedModel
from noria.settings import QuantizeSettings
from train.export.gptq_format import PackedLinear, pack

if TYPE_CHECKING:
    import torch
    from torch import nn

_LAYER = re.compile(r"^(.+\.layers\.\d+)\.(.+)$")


@dataclass(frozen=True)
class QuantisedLinear:
    """One linear's result. `loss` is GPTQ's mean squared output error per sample, shared by its group."""

    name: str
    packed: PackedLinear
    loss: float


@dataclass
class _Recording:
    """What one sample did at one layer: the arguments beside the stream, and what was added before this layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: torch.Tensor | None = None


@dataclass
class _Tape:
    """The first layer's input of every sample, and every layer's recordings of every sample."""

    streams: list[torch.Tensor] = field(default_factory=list)
    layers: list[list[_Recording]] = field(default_factory=list)


class _Reached(Exception):
    """Ends a forward at the linear whose input was wanted."""


def quantise_layers(
    model: nn.Module,
    linears: Sequence[str],
    inputs: Sequence[dict[str, Any]],
    settings: QuantizeSettings,
    scale_dtype: torch.dtype,
    progress: Callable[[float], None],
) -> Iterator[QuantisedLinear]:
    """Quantises the linears of one model in place and yields each one packed.

    `scale_dtype` is that of the stored scales; the weights left in the model are those that the stored tensors mean.
    """
    import torch

    grouped = _by_layer(linears)
    layers = [model.get_submodule(path) for path in grouped]
    with torch.no_grad():
        tape = _record(model, layers, inputs)
        for number, (path, names) in enumerate(grouped.items()):
            for group in _groups(layers[number], names, tape, number):
                yield from _solve(layers[number], path, group, tape, number, settings, scale_dtype)
            _advance(layers[number], tape, number)
            progress((number + 1) / len(grouped))


def _by_layer(linears: Sequence[str]) -> dict[str, list[str]]:
    """Linears' names inside each decoder layer, layers in order."""
    grouped: dict[str, list[str]] = {}
    for name in linears:
        match = _LAYER.match(name)
        if match is None:
            raise UnsupportedModel(f"linear {name} lies in no decoder layer")
        grouped.setdefault(match[1], []).append(match[2])
    return dict(sorted(grouped.items(), key=lambda item: int(item[0].rsplit(".", 1)[1])))


def _record(model: Any, layers: Sequence[nn.Module], inputs: Sequence[dict[str, Any]]) -> _Tape:
    """Runs every sample once through the unquantised model and writes down what each layer was given."""
    tape = _Tape(layers=[[] for _ in layers])
    last: list[torch.Tensor] = []

    def before(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            beside = dict(kwargs)
            stream = args[0] if args else beside.pop("hidden_states")
            recording = _Recording(args[1:], beside)
            if number == 0:
                tape.streams.append(stream)
            elif not bool((stream == last[0]).all()):
                recording.added = stream - last[0]
            tape.layers[number].append(recording)

        return hook

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        last[:] = [_stream(output)]

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        for sample in inputs:
            getattr(model, model.base_model_prefix, model)(**sample, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tape


def _groups(layer: nn.Module, names: Sequence[str], tape: _Tape, number: int) -> list[list[str]]:
    """The layer's linears in the order in which they run, those that read one and the same tensor together."""
    seen: list[tuple[tuple[int, ...], list[str]]] = []
    kept: list[Any] = []  # so that no two inputs ever share an address

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            value = args[0]
            key = (value.data_ptr(), *value.shape)
            kept.append(value)
            if seen and seen[-1][0] == key:
                seen[-1][1].append(name)
            else:
                seen.append((key, [name]))

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        _run(layer, tape, number, 0)
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for _, group in seen]
    missed = sorted(set(names) - {name for group in groups for name in group})
    if missed:
        raise UnsupportedModel(f"calibration never reached {', '.join(missed)} in decoder layer {number}")
    return groups


def _solve(
    layer: nn.Module,
    path: str,
    group: Sequence[str],
    tape: _Tape,
    number: int,
    settings: QuantizeSettings,
    scale_dtype: torch.dtype,
) -> Iterator[QuantisedLinear]:
    """Quantises the linears of one group together and puts the quantised weights into the layer."""
    import torch

    modules: list[Any] = [layer.get_submodule(name) for name in group]
    stacked_OI = torch.cat([module.weight.detach().float() for module in modules])
    solver = _solver(stacked_OI, settings)

    def feed(_: nn.Module, args: tuple[Any, ...]) -> None:
        solver.add_batch(args[0], None)
        raise _Reached

    handle = modules[0].register_forward_pre_hook(feed)
    try:
        for sample in range(len(tape.streams)):
            try:
                _run(layer, tape, number, sample)
            except _Reached:
                continue
    finally:
        handle.remove()
    solved_OI, scales_OG, zeros_OG, _, _, loss, _, _ = solver.quantize()
    solver.free()
    names = ", ".join(f"{path}.{name}" for name in group)
    if not isinstance(loss, float) or not bool(torch.isfinite(solved_OI).all() & torch.isfinite(scales_OG).all()):
        raise TrainingError(f"GPTQ found no finite solution for {names}: loss {loss}")
    steps_OG = scales_OG.repeat_interleave(settings.group_size, dim=1)
    points_OG = zeros_OG.repeat_interleave(settings.group_size, dim=1)
    q_OI = (torch.round(solved_OI.float() / steps_OG) + points_OG).clamp_(0, 2**settings.bits - 1)
    stored_OG = scales_OG.to(scale_dtype)
    meant_OI = (q_OI - points_OG) * stored_OG.float().repeat_interleave(settings.group_size, dim=1)
    rows = [module.weight.shape[0] for module in modules]
    parts = zip(group, modules, q_OI.split(rows), zeros_OG.split(rows), stored_OG.split(rows), strict=True)
    for (name, module, q, zeros, scales), meant in zip(parts, meant_OI.split(rows), strict=True):
        module.weight.data = meant.to(module.weight.dtype)
        packed = pack(q.cpu().to(torch.int64), zeros.cpu().to(torch.int64), scales.cpu(), settings.bits)
        yield QuantisedLinear(f"{path}.{name}", packed, loss)


def _solver(weight_OI: torch.Tensor, settings: QuantizeSettings) -> Any:
    """gptqmodel's GPTQ for one weight."""
    import torch

    make_solver, make_config = _gptqmodel()
    linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    config = make_config(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=True,
        desc_act=False,
        damp_percent=settings.damp,
        offload_to_disk=False,
        fallback=None,  # a layer that GPTQ cannot solve fails the job; it is not rounded to nearest in silence
    )
    solver = make_solver(linear, config)
    solver.quantizer.configure(perchannel=True)
    return solver


def _gptqmodel() -> tuple[Any, Any]:
    """gptqmodel's solver and its settings class, its banner kept off stdout, where a command prints its JSON."""
    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1)
    )  # its pool refuses to start with fewer cores
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("logbar").LogBar.shared().setLevel("ERROR")
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    return GPTQ, QuantizeConfig


def _run(layer: nn.Module, tape: _Tape, number: int, sample: int) -> torch.Tensor:
    recording = tape.layers[number][sample]
    return _stream(layer(tape.streams[sample], *recording.args, **recording.kwargs))


def _advance(layer: nn.Module, tape: _Tape, number: int) -> None:
    """Replaces every sample's stream by what the quantised layer makes of it, and what is added after it."""
    for sample in range(len(tape.streams)):
        output = _run(layer, tape, number, sample)
        if number + 1 < len(tape.layers):
            added = tape.layers[number + 1][sample].added
            output = output if added is None else output + added
        tape.streams[sample] = output
    tape.layers[number] = []


def _stream(output: Any) -> torch.Tensor:
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream
