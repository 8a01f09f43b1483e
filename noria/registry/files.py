"""Files of a version: listing, hashing, making durable, checking against a manifest.

Comes in: a folder. Goes out: hashes, or an IntegrityError that names the file.
Must not import torch, vllm, fastapi or the store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from noria.blobs import sync_folder
from noria.errors import IntegrityError
from noria.registry.manifest import MANIFEST, FileEntry

CHUNK_BYTES = 1 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that can run code when they are read."""
THREADS = 4  # hashing leaves the interpreter's lock; more threads than that only fight for the disk


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """Hash and size of every file but the manifest, by path relative to the folder."""
    paths = list_files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        entries = pool.map(_entry, (folder / path for path in paths))
        return dict(zip(paths, entries, strict=True))


def sync_tree(folder: Path) -> None:
    """Puts every file and folder on the disk, files first."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(Path(where, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(where))


def check_folder(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raises IntegrityError naming a file that is missing, extra, or not of the size and hash that are written down.

    Names and sizes come first: they cost nothing and find most damage.
    """
    present = list_files(folder)
    for path in sorted(set(files) - set(present)):
        raise IntegrityError(f"{folder.name}/{path} is missing", param=path, code="file_missing")
    for path in sorted(set(present) - set(files)):
        raise IntegrityError(f"{folder.name}/{path} is not in the manifest", param=path, code="file_extra")
    for path, expected in files.items():
        size = (folder / path).stat().st_size
        if size != expected.size:
            message = f"{folder.name}/{path} has {size} bytes, its manifest says {expected.size}"
            raise IntegrityError(message, param=path, code="size_differs")
    for path, found in hash_folder(folder).items():
        if found.sha256 != files[path].sha256:
            message = f"{folder.name}/{path} has sha256 {found.sha256}, its manifest says {files[path].sha256}"
            raise IntegrityError(message, param=path, code="hash_differs")


def list_files(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, sorted. Raises IntegrityError for a link or a special file."""
    found = []
    for where, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(where, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise IntegrityError(f"{folder.name}/{relative} is not a plain file", param=relative, code="file_extra")
            if path.is_file() and relative != MANIFEST:
                found.append(relative)
    return sorted(found)


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), size=size)
