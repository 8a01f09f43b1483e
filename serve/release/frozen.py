"""Holds a version to what its manifest says of its modules: what it calls frozen is the parent's, byte for byte.

Comes in: the candidate's serving folder, its manifest and its parent's. Goes out: nothing, or an IntegrityError that
names the module. Blocking: run it in a thread. Must not import torch or vllm.
"""

from __future__ import annotations

import json
from pathlib import Path

from noria.errors import IntegrityError
from noria.modules import architecture_of
from noria.modules.hashes import module_hashes
from noria.records import MODULES
from noria.registry import Manifest
from serve.release.validate import read_tensors


def check_frozen(serving: Path, manifest: Manifest, parent: Manifest | None) -> None:
    """Raises IntegrityError unless every module that the manifest calls frozen has the hash it tells, and the
    parent's where the parent tells one (it tells none of a module that it trained itself).
    """
    told = {module: manifest.frozen[module] for module in MODULES if module in manifest.frozen}
    if not told:
        return
    architecture = architecture_of(json.loads((serving / "config.json").read_text()))
    for module, found in module_hashes(architecture, read_tensors(serving), told).items():
        if found != told[module]:
            raise IntegrityError(f"{module} hashes to {found}, the manifest of {manifest.id} says {told[module]}")
        inherited = parent.frozen.get(module, found) if parent is not None else found
        if found != inherited:
            raise IntegrityError(
                f"{manifest.id} calls {module} frozen, but it hashes to {found} and {manifest.parent}'s to {inherited}"
            )
