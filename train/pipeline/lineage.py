"""Where a job starts from: the live version, its ancestors' deltas and the master at their root.

Comes in: registry and home. Goes out: a `Parent`, or a refusal that says what is missing. Must not import torch.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from noria.errors import Conflict, TrainingError
from noria.modules import architecture_of
from noria.registry import Base, Manifest, Registry
from train.methods.delta import delta_folders

DISK_FACTOR = 2.2  # merged model, quantised model (smaller than the master), adapter, and room for a staged copy
DISK_RESERVE_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Parent:
    """The version that a job improves.

    `adapters` are the lineage's delta folders, oldest first; master plus all of them is what it serves, quantised, from
    `serving`.
    """

    manifest: Manifest
    base: Base
    master: Path
    adapters: tuple[Path, ...]
    serving: Path

    @property
    def version(self) -> str:
        """The parent's id."""
        return self.manifest.id


def live_version(registry: Registry) -> str:
    """The version that is live. Raises Conflict when there is none."""
    live = registry.live()
    if live is None:
        raise Conflict("no version is live, so there is nothing to train: add a model first", code="no_model")
    return live


def find_parent(registry: Registry, home: Path, version: str) -> Parent:
    """Resolves a version's lineage.

    Raises TrainingError (no master, an adapter missing or empty) or UnsupportedModel (unknown to the module map).
    """
    lineage = registry.lineage(version)
    base = next((manifest.base for manifest in lineage if manifest.base is not None), None)
    if base is None:
        raise TrainingError(f"no master: neither {version} nor an ancestor names a base model", code="no_master")
    master = home / base.path
    if not (master / "config.json").is_file() or not any(master.glob("*.safetensors")):
        raise TrainingError(
            f"no master: {version} descends from {base.name}, whose full-precision weights should be in {master}; "
            "add the model again with `noria model add`",
            code="no_master",
        )
    architecture_of(json.loads((master / "config.json").read_text()))
    adapters: list[Path] = []
    for manifest in lineage:
        adapter = registry.path(manifest.id) / "adapter"
        if adapter.is_dir():
            adapters += delta_folders(adapter)
        elif manifest.parent is not None:
            raise TrainingError(
                f"{manifest.id} is a trained version but has no adapter in {adapter}", code="no_adapter"
            )
    return Parent(lineage[-1], base, master, tuple(adapters), registry.path(version) / "serving")


def require_disk(master_bytes: int, folder: Path, free_bytes: int | None = None) -> None:
    """Raises TrainingError when the disk that holds `folder` cannot take the job's files, with both figures."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    needed = int(master_bytes * DISK_FACTOR) + DISK_RESERVE_BYTES
    if free < needed:
        raise TrainingError(
            f"the disk is too small: a job over a master of {_gib(master_bytes)} needs about {_gib(needed)} in "
            f"{folder}, {_gib(free)} are free",
            code="disk_too_small",
        )


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"
