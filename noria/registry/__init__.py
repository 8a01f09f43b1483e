"""The registry: immutable versions in folders, and the one that is live.

Comes in: a staging folder that a job has filled. Goes out: published versions, checked to the byte.
Must not import torch, vllm, fastapi, serve or train.

A version is published by writing beside, fsync and rename. The folder with its manifest is the truth; the store's row
follows it, and `reconcile` adds the row that a crash between the two has left out.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from noria.blobs import sync_folder
from noria.errors import IntegrityError, InvalidRequest, NotFound
from noria.records import Version, VersionState
from noria.registry.files import check_folder, hash_folder, sync_tree
from noria.registry.manifest import MANIFEST, Base, FileEntry, Manifest, ManifestDraft, fingerprint
from noria.store import Store

__all__ = ["Base", "FileEntry", "Manifest", "ManifestDraft", "Registry", "fingerprint"]

STAGING = ".staging-"
STALE_S = 24 * 3600.0
_VERSION = re.compile(r"v([1-9][0-9]*)")
_log = logging.getLogger(__name__)


class Registry:
    """The versions under one folder, with their rows in one store. Safe from several threads and processes."""

    def __init__(self, models_dir: Path, store: Store) -> None:
        self._dir = models_dir
        self._store = store

    def begin(self, hint: str = "") -> Path:
        """A fresh, empty folder to fill with adapter/, serving/ and probe.json, and then to publish."""
        self._dir.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", hint)[:40]
        return Path(tempfile.mkdtemp(prefix=f"{STAGING}{name}-" if name else STAGING, dir=self._dir))

    def publish(self, staging: Path, draft: ManifestDraft) -> Manifest:
        """Makes the staging folder the next version, as a candidate; after a crash anywhere it is there whole or not.

        A job publishes once: if a version of `draft.job` exists, that one is returned and the staging removed.
        Raises InvalidRequest for a folder that `begin` did not make, IntegrityError for links in it.
        """
        if staging.parent.resolve() != self._dir.resolve() or not staging.name.startswith(STAGING):
            raise InvalidRequest(f"{staging} is not a staging folder of {self._dir}: get one from begin()")
        with self._locked():
            existing = self._published_by(draft.job)
            if existing is not None:
                shutil.rmtree(staging, ignore_errors=True)
                return existing
            (staging / MANIFEST).unlink(missing_ok=True)
            said = draft.model_dump(mode="json")
            said |= {"id": self._next_id(), "created_at": time.time(), "files": hash_folder(staging)}
            manifest = Manifest.parse(Manifest.model_validate(said).raw(), MANIFEST)
            (staging / MANIFEST).write_bytes(manifest.raw())
            staging.chmod(0o755)  # mkdtemp made it private; server and trainer may be different users
            sync_tree(staging)
            os.rename(staging, self._dir / manifest.id)
            sync_folder(self._dir)
            self._insert(manifest)
        return manifest

    def manifest(self, version: str) -> Manifest:
        """The version's manifest. Raises NotFound, or IntegrityError for one that cannot be read."""
        path = self.path(version) / MANIFEST
        try:
            raw = path.read_bytes()
        except FileNotFoundError as error:
            raise IntegrityError(f"{version}/{MANIFEST} is missing", param=MANIFEST, code="file_missing") from error
        manifest = Manifest.parse(raw, f"{version}/{MANIFEST}")
        if manifest.id != version:
            raise IntegrityError(f"{version}/{MANIFEST} is the manifest of {manifest.id}", param=MANIFEST)
        return manifest

    def path(self, version: str) -> Path:
        """The version's folder. Raises NotFound."""
        folder = self._dir / version
        if not _VERSION.fullmatch(version) or not folder.is_dir():
            raise NotFound(f"no version {version!r} in {self._dir}", param="version")
        return folder

    def verify(self, version: str) -> Manifest:
        """Reads every byte of the version; returns its manifest when all is as published.

        Raises IntegrityError that names the file, and both hashes or sizes, or says that it is missing or extra.
        """
        manifest = self.manifest(version)
        published = self._store.manifest_sha256(version)
        if published is not None and published != manifest.sha256():
            message = f"{version}/{MANIFEST} has sha256 {manifest.sha256()}, it was published as {published}"
            raise IntegrityError(message, param=MANIFEST, code="hash_differs")
        check_folder(self.path(version), manifest.files)
        return manifest

    def lineage(self, version: str) -> list[Manifest]:
        """The version's ancestors and itself, the root first. Raises NotFound, or IntegrityError for a circle."""
        found: list[Manifest] = []
        at: str | None = version
        while at is not None:
            if any(one.id == at for one in found):
                raise IntegrityError(f"the lineage of {version} comes back to {at}", param="parent")
            found.append(self.manifest(at))
            at = found[-1].parent
        return found[::-1]

    def reconcile(self, stale_s: float = STALE_S) -> list[str]:
        """Adds the rows of versions whose publication a crash cut short, and removes staging folders that are stale.

        Returns the ids that were added. A folder whose manifest cannot be read is left alone, with a warning.
        """
        if not self._dir.is_dir():
            return []
        added = []
        with self._locked():
            known = {version.id for version in self._store.list_versions()}
            for id_, manifest in self._without_row(known):
                self._insert(manifest)
                added.append(id_)
            self._remove_stale(stale_s)
        return added

    def list_versions(self) -> list[Version]:
        """Every version's row, oldest first."""
        return self._store.list_versions()

    def live(self) -> str | None:
        """The version new traffic gets."""
        return self._store.live()

    def previous(self) -> str | None:
        """The version that was live before."""
        return self._store.previous()

    def promote(self, version: str, rollout_id: str | None = None) -> None:
        """Makes a version live, in one transaction. Raises NotFound when its row or its folder is missing."""
        self.path(version)
        self._store.promote(version, rollout_id)

    def rollback(self) -> str:
        """Makes the previous version live again, in one transaction; returns it. Raises Conflict if there is none."""
        back = self._store.previous()
        if back is not None:
            self.path(back)
        return self._store.rollback()

    def set_state(self, version: str, state: VersionState) -> None:
        """Marks a version, for example as rejected."""
        self._store.set_version_state(version, state)

    def _insert(self, manifest: Manifest) -> None:
        self._store.add_version(manifest.record(), manifest.sha256())

    def _published_by(self, job: str | None) -> Manifest | None:
        """Rows first, then the folders without a row: a crash may have come between the two."""
        if job is None:
            return None
        rows = {version.id: version.job for version in self._store.list_versions()}
        for id_, made_by in rows.items():
            if made_by == job:
                return self.manifest(id_)
        for id_, manifest in self._without_row(set(rows)):
            if manifest.job == job:
                self._insert(manifest)
                _log.info("version_reconciled", extra={"version": id_})
                return manifest
        return None

    def _without_row(self, known: set[str]) -> Iterator[tuple[str, Manifest]]:
        for id_ in self._folders():
            if id_ not in known:
                try:
                    yield id_, self.manifest(id_)
                except IntegrityError as error:
                    _log.warning("version_unreadable", extra={"version": id_, "error": error.message})

    def _folders(self) -> list[str]:
        found = [path.name for path in self._dir.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_number)

    def _next_id(self) -> str:
        """One past every version that has a folder or a row: a number is never used twice."""
        taken = [*self._folders(), *(version.id for version in self._store.list_versions())]
        return f"v{max(map(_number, taken), default=0) + 1}"

    def _remove_stale(self, stale_s: float) -> None:
        for path in self._dir.glob(f"{STAGING}*"):
            if path.is_dir() and time.time() - _newest_change(path) > stale_s:
                shutil.rmtree(path, ignore_errors=True)
                _log.info("staging_removed", extra={"path": path.name})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One publisher at a time, over all processes of this machine; the system lets go when one dies."""
        self._dir.mkdir(parents=True, exist_ok=True)
        with (self._dir / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _number(id_: str) -> int:
    found = _VERSION.fullmatch(id_)
    return int(found[1]) if found else 0


def _newest_change(folder: Path) -> float:
    """A job may write deep inside its staging for hours: the newest change anywhere in it counts."""
    newest = 0.0
    for where, _, names in os.walk(folder):
        for path in (Path(where), *(Path(where, name) for name in names)):
            with suppress(FileNotFoundError):  # its job renames files meanwhile
                newest = max(newest, path.lstat().st_mtime)
    return newest
