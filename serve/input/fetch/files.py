"""Pictures of one folder, where an operator allows one.

Comes in: a `file://` URL. Goes out: the file's bytes, or NotFetched, which never says whether a file outside exists.
Blocking: run it in a thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from noria.settings import ImageSettings
from serve.input.fetch.targets import NotFetched

OUTSIDE = "is no file in the folder that is allowed (input.images.allowed_folder)"


def read_file_url(url: str, limits: ImageSettings) -> bytes:
    """The bytes of a regular file inside `input.images.allowed_folder`, wherever links lead. Raises NotFetched."""
    if limits.allowed_folder is None:
        raise NotFetched(
            "image_file", "is a file of the server, and no folder is allowed (input.images.allowed_folder)"
        )
    try:
        parts = urlsplit(url)
        named = unquote(parts.path, errors="strict")
        if parts.netloc not in ("", "localhost") or "\0" in named:
            raise ValueError
        folder = limits.allowed_folder.resolve(strict=True)
        path = Path(named).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise ValueError
        data = _regular(path, limits.max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise NotFetched("image_file", OUTSIDE) from error
    if len(data) > limits.max_bytes:
        raise NotFetched("image_bytes", f"has more than {limits.max_bytes} bytes (input.images.max_bytes)")
    return data


def _regular(path: Path, most: int) -> bytes:
    """What a regular file begins with; a link that was put there meanwhile, a pipe or a device is none."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("no regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)
