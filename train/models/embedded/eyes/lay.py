"""Gives a blank master its eyes.

Comes in: an eyes folder, a blank master. Goes out: a master that sees, with a mark that says by which eyes.
The file is unpacked into a delta folder and folded in by `train.export.merge`, as a job's own deltas are: what is
assembled here is, bit for bit, what the training would have merged from these numbers.
Must not import transformers or peft.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from noria.errors import IntegrityError
from noria.modules import Architecture, architecture_of
from noria.records import Json
from train.export.checkpoint import NewTensor, TensorEntry, file_index, read_bytes, read_header, write_file
from train.export.merge import merge
from train.methods.delta import FULL, LORA, LORA_CONFIG, POLICIES
from train.models.embedded.eyes.record import Eyes, EyesRecord

MARK = "noria.json"
RANK, ALPHA, SCALE = "lora_rank", "lora_alpha", "lora_scale"  # keys of the weights' own header
LORA_NAME = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_[AB]\.weight")


def lay_over(eyes: Eyes, blank: Path, out: Path) -> None:
    """Writes the sighted master to `out`, which must not exist. The blank one stays as it is.

    Raises TrainingError when a tensor has no place in the master, or another shape there.
    """
    architecture = architecture_of(json.loads((blank / "config.json").read_text()))
    with tempfile.TemporaryDirectory(prefix=".eyes-", dir=out.parent) as scratch:
        delta = Path(scratch) / "delta"
        unpack(eyes, architecture, delta)
        merge(blank, [delta], out)
    (out / MARK).write_text(json.dumps({"eyes": eyes_hash(eyes.record)}) + "\n")


def eyes_of(master: Path) -> str | None:
    """The hash of the eyes that a master was given, `sha256:..`; none for any other master."""
    try:
        told = json.loads((master / MARK).read_text()).get("eyes")
    except (OSError, ValueError, AttributeError):
        return None
    return str(told) if told is not None else None


def eyes_hash(record: EyesRecord) -> str:
    """How a master and a manifest name these eyes."""
    return f"sha256:{record.sha256}"


def unpack(eyes: Eyes, architecture: Architecture, out: Path) -> None:
    """Writes the eyes as a delta folder (`train.methods.delta`). Raises IntegrityError for an unknown tensor."""
    index = file_index(eyes.weights)
    lora = {name: entry for name, entry in index.items() if LORA_NAME.fullmatch(name)}
    whole = {hf_name(name, architecture): entry for name, entry in index.items() if name not in lora}
    policies: Json = {architecture.module_of(name): {"policy": "full"} for name in whole}
    out.mkdir(parents=True)
    if lora:
        policies["language_model"] = {"policy": "lora"}
        (out / LORA_CONFIG).write_text(json.dumps(_lora_config(eyes, lora), indent=2) + "\n")
        _write(out / LORA, lora)
    _write(out / FULL, whole)
    (out / POLICIES).write_text(json.dumps(policies, indent=2, sort_keys=True) + "\n")


def hf_name(name: str, architecture: Architecture) -> str:
    """What transformers calls a tensor that checkpoints call `name`. Raises IntegrityError when nothing is."""
    spelled = {prefix: part.hf for part in architecture.parts for prefix in part.checkpoint}
    prefix = max((one for one in spelled if name.startswith(one)), key=len, default=None)
    if prefix is None:
        raise IntegrityError(f"the embedded model's eyes hold {name}, which is no tensor of {architecture.name}")
    return spelled[prefix] + name.removeprefix(prefix)


def _lora_config(eyes: Eyes, lora: Mapping[str, TensorEntry]) -> Json:
    header, _ = read_header(eyes.weights)
    told: Mapping[str, str] = header.get("__metadata__", {})
    try:
        rank, alpha = int(told[RANK]), float(told[ALPHA])
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"{eyes.weights} holds a LoRA and does not say its rank and alpha: {error!r}") from error
    linears = sorted({match["linear"] for name in lora if (match := LORA_NAME.fullmatch(name))})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": linears}


def _write(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    write_file(path, [NewTensor(n, e.dtype, e.shape, bytes(read_bytes(e))) for n, e in sorted(tensors.items())])
