"""The embedded model: what `noria up` serves when nobody names a model.

Comes in: an empty home, the shipped eyes. Goes out: `masters/embedded` and its published version; or, for those who
train the eyes, `masters/embedded-blank` and its. Every step is done once: a verified download, a finished master and a
published version are found again.
Must not import `serve`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from noria.errors import IntegrityError
from noria.registry import Manifest, Registry
from noria.settings import Settings
from train.export.checkpoint import fsync_tree, tree_hash
from train.models.add import Conversations, Progress, make_live, publish_master, published
from train.models.embedded import BLANK, EMBEDDED
from train.models.embedded.download import GGUF_NAME, GGUF_SHA256, fetch_gguf
from train.models.embedded.eyes.lay import eyes_hash, eyes_of, lay_over
from train.models.embedded.eyes.record import SHIPPED, Eyes, open_eyes, read_record
from train.models.embedded.eyes.seen import seen_conversations
from train.models.intake import Master, require_disk, settle

_NEEDED_BYTES = 1_500_000_000  # download 200 MB, masters 280 MB each, version 150 MB, and as much again beside them


def build_embedded(registry: Registry, settings: Settings, progress: Progress, eyes: Path = SHIPPED) -> Manifest:
    """Builds the embedded model's version where it is missing; stages download, assemble, quantize, verify, publish.

    A master that is there already is left as it is, with or without eyes; `base.eyes` in the manifest says with which.
    Raises IntegrityError, before anything is fetched, when the eyes are missing or not what their record says.
    """
    existing = published(registry, EMBEDDED)
    if existing is not None:
        return make_live(registry, existing)
    master = make_master(settings, progress, eyes)
    return publish_master(master, registry, settings, progress, _conversations(master, eyes, settings))


def make_master(settings: Settings, progress: Progress, eyes: Path = SHIPPED) -> Master:
    """`masters/embedded`: the one that is there, or a blank one with the eyes laid over it. Raises IntegrityError."""
    target = settings.masters_dir / EMBEDDED
    return _found(target) if target.is_dir() else _sighted(open_eyes(eyes), target, settings, progress)


def build_blank(registry: Registry, settings: Settings, progress: Progress) -> Manifest:
    """Builds the version that the eyes' recipe starts from, where it is missing. It never goes live by itself."""
    existing = published(registry, BLANK)
    if existing is not None:
        return existing
    target = settings.masters_dir / BLANK
    if not target.is_dir():
        with _assembled(settings, progress) as blank:
            settle(blank, target, "master")
    return publish_master(_found(target), registry, settings, progress, live=False)


def _found(target: Path) -> Master:
    return Master(target.name, target, tree_hash(target), "master")


def _sighted(eyes: Eyes, target: Path, settings: Settings, progress: Progress) -> Master:
    known = (eyes.record.language_model, eyes.record.language_model_sha256)
    if known != (GGUF_NAME, GGUF_SHA256):
        told = f"{known[0]} (sha256 {known[1]}), and this is {GGUF_NAME} ({GGUF_SHA256})"
        raise IntegrityError(f"the eyes in {eyes.folder} were trained with another language model: {told}")
    with _assembled(settings, progress) as blank:
        sighted = blank.with_name("sighted")
        lay_over(eyes, blank, sighted)
        fsync_tree(sighted)
        return settle(sighted, target, "master")


def _conversations(master: Master, eyes: Path, settings: Settings) -> Conversations | None:
    """What a sighted master is calibrated on: rows that its eyes were trained on. None: the general ones."""
    mark = eyes_of(master.path)
    if mark is None or mark != eyes_hash(read_record(eyes)):
        return None
    return seen_conversations(open_eyes(eyes).recipe, settings.train)


@contextmanager
def _assembled(settings: Settings, progress: Progress) -> Iterator[Path]:
    """A blank master in a folder that goes away; what stands beside it there goes too."""
    from train.models.embedded.assemble import assemble

    settings.masters_dir.mkdir(parents=True, exist_ok=True)
    require_disk(settings.masters_dir, _NEEDED_BYTES)
    progress("download", 0.0)
    gguf = fetch_gguf(settings.home / "downloads", lambda share: progress("download", share))
    staging = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=settings.masters_dir))
    try:
        blank = staging / "blank"
        blank.mkdir()
        assemble(gguf, blank, lambda share: progress("assemble", share))
        fsync_tree(blank)
        yield blank
    finally:
        shutil.rmtree(staging, ignore_errors=True)
