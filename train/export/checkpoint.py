"""Safetensors checkpoints as files: read headers, stream tensors, rewrite some and leave the others' bytes alone.

Comes in: a checkpoint folder. Goes out: an index of its tensors, raw bytes, new files, hashes.
The format is that of https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, data.
Working on the files, and not on a loaded model, is what keeps names and bytes as the base's author wrote them.
Must not import transformers or gptqmodel.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from noria.errors import IntegrityError, UnsupportedModel
from noria.registry.files import PICKLES

INDEX_NAME = "model.safetensors.index.json"
LEFT_OUT = (".safetensors", ".gguf", ".msgpack", ".h5", ".py", *PICKLES)  # weights, and code
BYTES_OF = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are absolute byte offsets in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's data."""
        return self.end - self.begin


@dataclass(frozen=True)
class NewTensor:
    """A tensor about to be written: `dtype` is the safetensors word, `data` its little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset at which data begins. IntegrityError if malformed."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise IntegrityError(f"{file} is not a safetensors file, or it is cut short: header of {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise IntegrityError(f"{file} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{file} has a header that is not an object")
    return header, 8 + length


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted; UnsupportedModel if there are none."""
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise IntegrityError(f"the checkpoint's index names files that are not there: {', '.join(missing)}")
    if not files:
        raise UnsupportedModel(f"{folder} holds no *.safetensors; pickled weights are refused", param="source")
    return files


def tensor_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name. IntegrityError when a file's length and header disagree."""
    index: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for name, entry in file_index(file).items():
            if name in index:
                raise IntegrityError(f"tensor {name} is in both {index[name].file.name} and {file.name}")
            index[name] = entry
    return index


def file_index(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file by name. IntegrityError when its length and header disagree."""
    index: dict[str, TensorEntry] = {}
    header, start = read_header(file)
    size = file.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + int(offset) for offset in entry["data_offsets"])
        if end > size:
            raise IntegrityError(f"{file} is cut short: tensor {name} ends at byte {end} of {size}")
        index[name] = TensorEntry(name, file, entry["dtype"], tuple(entry["shape"]), begin, end)
    return index


def read_bytes(entry: TensorEntry) -> bytearray:
    """One tensor's data."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return bytearray(stream.read(entry.size_bytes))


def tree_hash(folder: Path) -> str:
    """`sha256:..` over the relative paths and contents of every file in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}:{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def copy_side_files(source: Path, out: Path) -> list[str]:
    """Copies what is neither weights nor code (tokenizer, processor, template, configs); returns the relative paths."""
    copied = []
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or file.suffix in LEFT_OUT or file.name == INDEX_NAME:
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / relative)
        copied.append(relative.as_posix())
    return copied


def rewrite(source: Path, out: Path, replace: Callable[[TensorEntry], list[NewTensor] | None]) -> None:
    """Writes `source`'s weight files anew into `out`.

    `replace` is asked for each tensor, in file order, and answers None (its bytes are copied as they are) or what
    stands in its place (nothing, one tensor or several). File names stay; the index is written again. Memory holds
    one file's replaced tensors.
    """
    entries = tensor_index(source)
    weight_map: dict[str, str] = {}
    total = 0
    for file in weight_files(source):
        header, _ = read_header(file)
        ordered = sorted((e for e in entries.values() if e.file == file), key=lambda e: e.begin)
        parts: list[TensorEntry | NewTensor] = []
        for entry in ordered:
            replaced = replace(entry)
            parts.extend([entry] if replaced is None else replaced)
        _write_file(out / file.name, parts, header.get("__metadata__", {"format": "pt"}))
        weight_map.update({part.name: file.name for part in parts})
        total += sum(_length(part) for part in parts)
    if (source / INDEX_NAME).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Iterable[NewTensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file of new tensors, in the order given; `metadata` goes into its header."""
    _write_file(path, list(tensors), {"format": "pt", **(metadata or {})})


def fsync_tree(folder: Path) -> None:
    """Flushes every file of a folder, and the folder, to the disk, so that a rename after it is a promise."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _length(part: TensorEntry | NewTensor) -> int:
    return part.size_bytes if isinstance(part, TensorEntry) else len(part.data)


def _write_file(path: Path, parts: list[TensorEntry | NewTensor], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for part in parts:
        end = offset + _length(part)
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for part in parts:
            _write_part(stream, part)


def _write_part(stream: BinaryIO, part: TensorEntry | NewTensor) -> None:
    if isinstance(part, NewTensor):
        stream.write(part.data)
        return
    for chunk in _chunks(part):
        stream.write(chunk)


def _chunks(entry: TensorEntry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.size_bytes
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise IntegrityError(f"{entry.file} is cut short in tensor {entry.name}")
            left -= len(chunk)
            yield chunk
