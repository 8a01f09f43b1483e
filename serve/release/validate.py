"""Looks at every byte of a version before the engine sees one: names, dtypes, shapes, lengths, finiteness, config.

Comes in: the `serving/` folder of a candidate and that of the version that runs. Goes out: nothing, or an
IntegrityError that names file and tensor. Blocking and bounded in memory: run it in a thread.
Must not import torch or vllm.

The running version's own files are the measure: what the engine loaded once with these names, dtypes and shapes it
loads again; anything else it may take in silence and answer nonsense (a missing GPTQ tensor is uninitialised memory).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from noria.errors import IntegrityError
from noria.registry.files import PICKLES

CHUNK_BYTES = 8 * 2**20
HEADER_LIMIT_BYTES = 100 * 2**20

# safetensors dtype -> (unsigned integer of its width, exponent mask): all exponent bits set is infinity or NaN
EXPONENT: dict[str, tuple[DTypeLike, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # this format has no infinity; its one NaN pattern has every bit set
}
QUANTIZATION_KEYS = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "lm_head",
    "dynamic",
    "pack_dtype",
    "modules_in_block_to_quantize",
)
CONFIG_NOTES = {"transformers_version", "_name_or_path", "_commit_hash", "quantization_config", "use_cache"}
READ_AT_START = ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, type, shape, and bytes [begin, end) of that file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def validate_serving(candidate: Path, running: Path) -> int:
    """Raises IntegrityError unless the engine that runs `running` can load `candidate`; returns the tensors checked."""
    _refuse_code(candidate)
    _compare_config(candidate, running)
    _compare_read_at_start(candidate, running)
    tensors, expected = read_tensors(candidate), read_tensors(running)
    _compare_tensors(tensors, expected, candidate)
    _check_index(candidate, tensors)
    for name, entry in tensors.items():
        check_finite(name, entry)
    return len(tensors)


def _refuse_code(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (*PICKLES, ".py"):
            raise IntegrityError(f"{file.name} can run code when it is read; a version is safetensors", param=file.name)


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's safetensors files by name. Raises IntegrityError where header and file disagree."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise IntegrityError(f"{folder} holds no safetensors file", param=str(folder))
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in tensors:
                raise IntegrityError(f"{file.name}: tensor {name} is also in {tensors[name].file.name}", param=name)
            tensors[name] = entry
    return tensors


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """The header of one safetensors file: 8 bytes of length, JSON, then the tensors' bytes without gaps."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT_BYTES):
            raise IntegrityError(f"{file.name}: {size} bytes do not hold the header they announce", param=file.name)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: TensorEntry(file, str(value["dtype"]), tuple(value["shape"]), *_span(value, 8 + length))
                for name, value in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{file.name}: the header is not safetensors ({error})", param=file.name) from error
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position or entry.end < entry.begin:
            raise IntegrityError(f"{file.name}: tensor {name} does not follow the one before it", param=name)
        position = entry.end
    if position != size:
        raise IntegrityError(
            f"{file.name} has {size} bytes where its header says {position}"
            + (": truncated" if size < position else ": something follows the last tensor"),
            param=file.name,
        )
    return entries


def _span(value: dict[str, Any], start: int) -> tuple[int, int]:
    begin, end = value["data_offsets"]
    return start + int(begin), start + int(end)


def _compare_tensors(tensors: dict[str, TensorEntry], expected: dict[str, TensorEntry], folder: Path) -> None:
    for name in sorted(expected.keys() - tensors.keys()):
        raise IntegrityError(f"{folder.name}: tensor {name} is missing; the running model loads it", param=name)
    for name in sorted(tensors.keys() - expected.keys()):
        where = tensors[name].file.name
        raise IntegrityError(f"{where}: tensor {name} is not one that the running model loads", param=name)
    for name, want in expected.items():
        have = tensors[name]
        if have.dtype != want.dtype:
            raise IntegrityError(
                f"{have.file.name}: tensor {name} is {have.dtype}, the running model loads {want.dtype}", param=name
            )
        if have.shape != want.shape or have.end - have.begin != want.end - want.begin:
            raise IntegrityError(
                f"{have.file.name}: tensor {name} has shape {list(have.shape)}, "
                f"the running model loads {list(want.shape)}",
                param=name,
            )


def _check_index(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    """vLLM leaves out files that the index does not name, so an index must say what the files say."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    weight_map = _json(path).get("weight_map", {})
    for name, entry in tensors.items():
        if weight_map.get(name) != entry.file.name:
            raise IntegrityError(
                f"{path.name}: tensor {name} lies in {entry.file.name}, the index says {weight_map.get(name)}",
                param=name,
            )
    for name in sorted(weight_map.keys() - tensors.keys()):
        raise IntegrityError(f"{path.name}: tensor {name} is in no file", param=name)


def check_finite(name: str, entry: TensorEntry) -> None:
    """Raises IntegrityError where a tensor of floating point numbers holds NaN or infinity."""
    if entry.dtype not in EXPONENT:
        return
    unsigned, mask = EXPONENT[entry.dtype]
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            chunk = np.frombuffer(stream.read(min(CHUNK_BYTES, left)), dtype=unsigned)
            if not chunk.size:
                raise IntegrityError(f"{entry.file.name}: tensor {name} ends early", param=name)
            masked = chunk & chunk.dtype.type(mask)
            if bool((masked == mask).any()):
                raise IntegrityError(f"{entry.file.name}: tensor {name} holds NaN or infinity", param=name)
            left -= chunk.nbytes


def _compare_config(candidate: Path, running: Path) -> None:
    have, want = _json(candidate / "config.json"), _json(running / "config.json")
    for key in sorted((have.keys() | want.keys()) - CONFIG_NOTES):
        if _bare(have.get(key)) != _bare(want.get(key)):
            raise IntegrityError(f"config.json: {key} differs from the running version's", param=key)
    quantized, expected = have.get("quantization_config") or {}, want.get("quantization_config") or {}
    for key in QUANTIZATION_KEYS:
        if quantized.get(key) != expected.get(key):
            raise IntegrityError(
                f"config.json: quantization_config.{key} is {quantized.get(key)!r}, "
                f"the running version's is {expected.get(key)!r}",
                param=key,
            )


def _compare_read_at_start(candidate: Path, running: Path) -> None:
    """Tokenizer, processor and template are read once, when the server starts: a swap does not change them."""
    for name in READ_AT_START:
        have, want = candidate / name, running / name
        if have.exists() != want.exists():
            raise IntegrityError(f"{name}: only one of the two versions has it; start the server on it", param=name)
        if have.exists() and have.read_bytes() != want.read_bytes():
            raise IntegrityError(
                f"{name} differs from the running version's; a swap changes weights only: start the server on it",
                param=name,
            )


def _bare(value: Any) -> Any:
    """A config's value without the notes that tools leave in it."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items() if key not in CONFIG_NOTES}
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} cannot be read: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path.name} is not a JSON object", param=path.name)
    return value
