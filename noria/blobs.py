"""Pictures by the SHA-256 of their bytes, in any place that fsspec knows.

Comes in: bytes as received. Goes out: `Image` records, and the bytes again.
Must not import torch, vllm or fastapi; Pillow only when a picture is stored.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from noria.errors import IntegrityError, NotFound, Unavailable
from noria.records import Image

FRESH_S = 900.0  # on an object store: a picture that was put so lately is not written again
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A place of immutable files `ab/abcd...`; safe from several threads and processes, since names are contents."""

    def __init__(self, url: str) -> None:
        """`url` is an fsspec URL: `file:///path`, `s3://bucket/prefix`, `memory://name`."""
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self._local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)

    def put(self, data: bytes, media_type: str) -> Image:
        """Stores a picture once. On local files it is on the disk when this returns; a reader never sees half of it."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._path(sha256)
        with _translated():
            if not self._refreshed(path):
                if self._local:
                    _write_durably(Path(path), data)
                else:
                    self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                    self._fs.pipe_file(path, data)
        width, height = _size(data)
        return Image(sha256, media_type, len(data), width, height)

    def get(self, sha256: str) -> bytes:
        """The bytes. Raises NotFound, and IntegrityError when they are not what the name says."""
        try:
            with _translated():
                data: bytes = self._fs.cat_file(self._known(sha256))
        except FileNotFoundError as error:
            raise _unknown(sha256) from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise IntegrityError(f"image {sha256} is damaged: its {len(data)} bytes have sha256 {found}")
        return data

    def exists(self, sha256: str) -> bool:
        """Whether the picture is stored."""
        if not _SHA256.fullmatch(sha256):
            return False
        with _translated():
            return bool(self._fs.exists(self._path(sha256)))

    def delete(self, sha256: str) -> None:
        """Deletes a picture; one that is not there is no error, since deleting may have to be tried again."""
        try:
            with _translated():
                self._fs.rm_file(self._known(sha256))
        except (FileNotFoundError, NotFound):
            return

    def older_than(self, before: float) -> Iterator[list[str]]:
        """Names of pictures that nobody put since `before` (seconds since the epoch), in some hundred groups.

        On local files what a crash left half-written is deleted on the way, at the same age.
        """
        for number in range(256):
            folder = f"{self._root}/{number:02x}"
            with _translated():
                try:
                    found = self._fs.ls(folder, detail=True, refresh=True)
                except FileNotFoundError:
                    continue
            old = [one["name"].rpartition("/")[2] for one in found if _put_at(one) < before]
            names = [name for name in old if _SHA256.fullmatch(name)]
            if self._local:
                for name in set(old).difference(names):
                    if name.startswith(".") and name.endswith(".tmp"):
                        Path(folder, name).unlink(missing_ok=True)
            if names:
                yield names

    def _refreshed(self, path: str) -> bool:
        """Whether the picture is there, and now as if just put: a sweep by age then leaves it alone."""
        if self._local:
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
            return True
        try:
            told = self._fs.info(path, refresh=True)
        except FileNotFoundError:
            return False
        return time.time() - _put_at(told) < FRESH_S  # an object store has no utime: old ones are written again

    def _known(self, sha256: str) -> str:
        """A name from outside must be a hash before it becomes a path."""
        if not _SHA256.fullmatch(sha256):
            raise _unknown(sha256)
        return self._path(sha256)

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"


class _translated:
    """Turns errors of the place (network, disk) into Unavailable; a missing file stays a missing file."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise Unavailable(f"the blobs do not answer: {error}", code="blobs_unavailable") from error


def _put_at(told: Mapping[str, Any]) -> float:
    """When a file was put, in seconds since the epoch, as fsspec's file systems tell it; now where they do not."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        at = told.get(key)
        if isinstance(at, datetime):
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        if isinstance(at, int | float):
            return float(at)
        if isinstance(at, str):
            return datetime.fromisoformat(at).timestamp()
    return time.time()


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; a rename is on the disk only after this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(data: bytes) -> tuple[int | None, int | None]:
    """Width and height, read from the header alone; (None, None) for what Pillow cannot read."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(BytesIO(data)) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
        return None, None


def _unknown(sha256: str) -> NotFound:
    return NotFound(f"no image {sha256!r}", param="image")
