"""Takes a user's checkpoint into `masters/`, or says why not.

Comes in: a folder. Goes out: `masters/NAME`, a full-precision checkpoint in safetensors.
A GPTQ checkpoint is dequantised on the way: training needs full-precision weights, and these are the ones it means.
Must not import transformers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from noria.errors import Conflict, InvalidRequest, UnsupportedModel
from noria.modules import architecture_of
from noria.records import Json
from noria.registry.files import PICKLES
from train.export.checkpoint import (
    NewTensor,
    TensorEntry,
    copy_side_files,
    fsync_tree,
    rewrite,
    tensor_index,
    tree_hash,
    weight_files,
)
from train.export.gptq_format import SUFFIXES, dequantise, format_of, quantised_linears, read_packed, to_new

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERVING_SHARE = 1.1  # a GPTQ checkpoint and its hashes never need more than this share of the master
_CONVERTED = ("quantize_config.json",)


@dataclass(frozen=True)
class Master:
    """A base in `masters/`. `kind` is "dequantised" where the user had only a quantised checkpoint."""

    name: str
    path: Path
    sha256: str
    kind: Literal["master", "dequantised"]


def check_source(source: Path) -> Json:
    """The checkpoint's config, once it is one that Noria takes.

    Raises InvalidRequest for what is no checkpoint folder, UnsupportedModel for pickled weights, code that comes with
    the model, an architecture outside the module map, or a quantisation other than GPTQ.
    """
    if not source.is_dir():
        raise InvalidRequest(
            f"{source} is not a folder; download the checkpoint first and name its folder", param="source"
        )
    if not (source / "config.json").is_file():
        raise InvalidRequest(f"{source} has no config.json: it is not a transformers checkpoint", param="source")
    config: Json = json.loads((source / "config.json").read_text())
    if "auto_map" in config:
        raise UnsupportedModel(f"{source} wants to run its own code (auto_map); that is refused", param="auto_map")
    pickles = sorted(file.name for file in source.rglob("*") if file.suffix.lower() in PICKLES)
    if pickles:
        raise UnsupportedModel(
            f"{source} holds pickled weights ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors, or remove them where the same weights lie beside them",
            param="source",
        )
    arch = architecture_of(config)
    index = tensor_index(source)
    arch.partition(index, spelling="checkpoint")
    if "quantization_config" in config:
        format_of(config["quantization_config"])
    return config


def take_in(source: Path, masters: Path, name: str) -> Master:
    """Copies (hard-links where it can) or dequantises a checked checkpoint into `masters/NAME`.

    The same checkpoint again is accepted; another one under a taken name, or too little disk, is a Conflict.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} cannot name a model: letters, digits, dot, dash, underscore", param="name")
    config = check_source(source)
    masters.mkdir(parents=True, exist_ok=True)
    quantised = config.get("quantization_config")
    require_disk(masters, _needed_bytes(source, masters, quantised))
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=masters))
    try:
        if quantised is None:
            _link_or_copy(source, staging)
        else:
            _dequantise(source, staging, config)
        staging.chmod(0o755)
        fsync_tree(staging)
        return settle(staging, masters / name, "master" if quantised is None else "dequantised")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle(staging: Path, target: Path, kind: Literal["master", "dequantised"]) -> Master:
    """Renames a finished folder into place, or finds that the very same one is there already."""
    sha256 = tree_hash(staging)
    if not target.exists():
        with suppress(FileExistsError):
            staging.rename(target)
    if tree_hash(target) != sha256:
        raise Conflict(f"{target} holds another model already; choose another --name", param="name")
    return Master(target.name, target, sha256, kind)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises Conflict, with both numbers, when the disk under `folder` has less room."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Conflict(
            f"the disk of {folder} has {free / 1e9:.1f} GB free; about {needed_bytes / 1e9:.1f} GB are needed",
            param="home",
            code="disk_full",
        )


def _needed_bytes(source: Path, masters: Path, quantised: Mapping[str, object] | None) -> int:
    """Room for the master (nothing where links work) and for the version made from it."""
    size = sum(file.stat().st_size for file in weight_files(source))
    if quantised is not None:
        size *= 16 // format_of(quantised)[0]
    linked = quantised is None and source.stat().st_dev == masters.stat().st_dev
    return int(size * _SERVING_SHARE) + (0 if linked else size)


def _link_or_copy(source: Path, out: Path) -> None:
    copy_side_files(source, out)
    for file in [*weight_files(source), *source.glob("*.safetensors.index.json")]:
        try:
            os.link(file.resolve(), out / file.name)
        except OSError:
            shutil.copyfile(file, out / file.name)


def _dequantise(source: Path, out: Path, config: Json) -> None:
    import torch

    bits, _, v1 = format_of(config["quantization_config"])
    index = tensor_index(source)
    linears = set(quantised_linears(index))
    text = config.get("text_config") or {}
    stored = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    dtype = torch.bfloat16 if stored == "bfloat16" else torch.float16

    def replace(entry: TensorEntry) -> list[NewTensor] | None:
        linear, _, suffix = entry.name.rpartition(".")
        if linear not in linears or suffix not in SUFFIXES:
            return None
        if suffix != "qweight":
            return []
        return [to_new(f"{linear}.weight", dequantise(read_packed(index, linear), bits, v1).to(dtype))]

    copy_side_files(source, out)
    for name in _CONVERTED:
        (out / name).unlink(missing_ok=True)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    rewrite(source, out, replace)
