"""Takes the eyes out of a version that the recipe made.

Comes in: a published version, its master, its deltas. Goes out: an eyes folder, small enough to travel in a repository.
Must not import transformers or peft.
"""

from __future__ import annotations

import math
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from noria.errors import Conflict, InvalidRequest, TrainingError
from noria.recipes import parse_recipe
from noria.records import Json
from noria.registry import Manifest, Registry
from noria.settings import Settings
from train.export.checkpoint import write_file
from train.models.embedded import BLANK, EMBEDDED
from train.models.embedded.download import GGUF_NAME, GGUF_SHA256
from train.models.embedded.eyes.card import render_card
from train.models.embedded.eyes.extract import Extracted, extract
from train.models.embedded.eyes.lay import ALPHA, RANK, SCALE, eyes_of
from train.models.embedded.eyes.record import (
    CARD,
    FILES,
    MOST_BYTES,
    RECORD,
    SCORES,
    WEIGHTS,
    Eyes,
    EyesRecord,
    TrainedStage,
    open_eyes,
    recipe_hash,
    recipe_json,
    sha256_of,
)
from train.models.embedded.eyes.scores import read_scores
from train.pipeline.lineage import find_parent
from train.stages.spec import LOG, read_steps

PACKAGES = ("noria", "torch", "transformers", "accelerate", "peft", "safetensors", "pillow")


def export_eyes(version_id: str, registry: Registry, settings: Settings, out: Path) -> Eyes:
    """Writes the folder `out`; what was measured of other weights in it goes.

    Raises InvalidRequest for a version that no recipe made from a blank master in one job, Conflict for a folder with
    other files, TrainingError for what an eyes folder cannot express (`extract`) or has no room for.
    """
    parent = find_parent(registry, settings.home, version_id)
    manifest = parent.manifest
    if parent.base.name not in (EMBEDDED, BLANK):
        raise InvalidRequest(f"{version_id} is a {parent.base.name}; eyes are the embedded model's", param="version")
    if manifest.method != "recipe" or not manifest.stages:
        raise InvalidRequest(f"{version_id} is of method {manifest.method!r}; eyes come from a recipe", param="version")
    if len(registry.lineage(version_id)) != 2:
        raise InvalidRequest(
            f"{version_id} descends from another trained version; eyes come from one recipe on a blank model",
            param="version",
        )
    if eyes_of(parent.master) is not None:
        raise InvalidRequest(f"{version_id} was trained from {parent.base.name}, which sees already", param="version")
    extracted = extract(parent.master, parent.adapters)
    return write_eyes(extracted, told_of(manifest, settings), out)


def write_eyes(extracted: Extracted, told: Json, out: Path) -> Eyes:
    """Writes weights, record and card. `told` are the record's other values. Raises Conflict and TrainingError."""
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES)
    if others:
        raise Conflict(f"{out} holds other files ({', '.join(others[:3])}); name an empty folder", param="out")
    beside = out.with_name(f".{out.name}-{WEIGHTS}")
    try:
        record = _written(extracted, told, beside)
        scores = read_scores(out, record)
        texts = {RECORD: record.model_dump_json(indent=2) + "\n", CARD: render_card(record, scores)}
        _require_small(record.size + sum(len(text.encode()) for text in texts.values()))
        beside.replace(out / WEIGHTS)
    finally:
        beside.unlink(missing_ok=True)
    if scores is None:  # of other weights, if there are any
        (out / SCORES).unlink(missing_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text)
    return open_eyes(out)


def _written(extracted: Extracted, told: Json, file: Path) -> EyesRecord:
    lora = extracted.lora
    header = {} if lora is None else {RANK: str(lora.rank), ALPHA: f"{lora.alpha:g}", SCALE: f"{lora.scale:g}"}
    write_file(file, extracted.tensors, header)
    return EyesRecord(
        sha256=sha256_of(file),
        size=file.stat().st_size,
        tensors=len(extracted.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in extracted.tensors),
        lora=lora,
        **told,
    )


def _require_small(size: int) -> None:
    if size > MOST_BYTES:
        raise TrainingError(f"the eyes are {size} bytes in all, {MOST_BYTES} at most: a smaller LoRA makes them fit")


def told_of(manifest: Manifest, settings: Settings) -> Json:
    """What a record tells of the version that the eyes were taken from."""
    kept = (manifest.model_extra or {}).get("settings", {})
    recipe = parse_recipe(kept.get("recipe", {}), where=f"{manifest.id}: settings.recipe")
    logs = [settings.jobs_dir / (manifest.job or "") / "train" / recipe.folder_of(n) for n in range(len(recipe.stages))]
    return {
        "language_model": GGUF_NAME,
        "language_model_sha256": GGUF_SHA256,
        "recipe": recipe_json(recipe),
        "recipe_sha256": recipe_hash(recipe),
        "stages": tuple(_stage(stage, folder / LOG) for stage, folder in zip(manifest.stages, logs, strict=True)),
        "version": manifest.id,
        "job": manifest.job,
        "created_at": manifest.created_at,
        "machine": machine_words(),
        "versions": package_versions(),
    }


def _stage(told: Json, log: Path) -> TrainedStage:
    """`seconds` of a report are its last attempt's; those of the log's steps are of all attempts. The larger counts."""
    stepped_s = sum(step.seconds for step in read_steps(log))
    return TrainedStage(
        name=told["name"],
        kind=told["kind"],
        steps=told["steps"],
        seconds=round(max(told["seconds"], stepped_s), 1),
        samples=told["data"]["samples"],
        data_sha256=told["data"]["sha256"],
        trainable_parameters=told["trainable_parameters"],
        loss_first=told["loss_first"],
        loss_last=told["loss_last"],
    )


def machine_words(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """This machine for a reader: `2 cores, x86_64 with AMX`, and its GPU where torch finds one."""
    import torch

    cores = len(os.sched_getaffinity(0))
    words = f"{cores} core{'s' if cores > 1 else ''}, {platform.machine()}"
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    words += " with AMX" if re.search(r"\bamx_bf16\b", text) else ""
    return f"{words}, {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else words


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a training goes through."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
