"""The embedded model: what `noria up` serves when nobody names a model.

Comes in: an empty home. Goes out: `masters/embedded` and its published version. Every step is done once: a verified
download, a finished master and a published version are found again.
Must not import `serve`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from noria.registry import Manifest, Registry
from noria.settings import Settings
from train.export.checkpoint import fsync_tree, tree_hash
from train.models.add import Progress, make_live, publish_master, published
from train.models.embedded.download import fetch_gguf
from train.models.intake import Master, require_disk, settle

EMBEDDED = "embedded"
_NEEDED_BYTES = 1_200_000_000  # download 200 MB, master 280 MB, version 150 MB, and as much again beside them


def build_embedded(registry: Registry, settings: Settings, progress: Progress) -> Manifest:
    """Builds the embedded model's version where it is missing; stages download, assemble, quantize, verify, publish."""
    existing = published(registry, EMBEDDED)
    if existing is not None:
        return make_live(registry, existing)
    settings.masters_dir.mkdir(parents=True, exist_ok=True)
    return publish_master(_master(settings, progress), registry, settings, progress)


def _master(settings: Settings, progress: Progress) -> Master:
    target = settings.masters_dir / EMBEDDED
    if target.is_dir():
        return Master(EMBEDDED, target, tree_hash(target), "master")
    from train.models.embedded.assemble import assemble

    require_disk(settings.masters_dir, _NEEDED_BYTES)
    progress("download", 0.0)
    gguf = fetch_gguf(settings.home / "downloads", lambda share: progress("download", share))
    staging = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=settings.masters_dir))
    try:
        assemble(gguf, staging, lambda share: progress("assemble", share))
        staging.chmod(0o755)
        fsync_tree(staging)
        return settle(staging, target, "master")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
