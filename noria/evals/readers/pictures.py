"""Pictures wherever a row says they are.

Comes in: a path, a `data:` URL, an `http(s)://`, `s3://` or other fsspec URL, a made one (`scene:...`), or a parquet
cell. Goes out: a `Picture`. Nothing is read before it is asked for; what is far away is fetched once.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from functools import cache
from pathlib import Path

from noria.errors import NoriaError
from noria.evals.questions import Picture
from noria.scenes import draw, is_made

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def picture_at(ref: str, folder: Path) -> Picture:
    """The picture that a row names; a relative path counts from `folder`. Its `read` raises OSError or ValueError."""
    if ref.startswith("data:"):
        return Picture(ref[:40], lambda: _from_data_url(ref))
    if is_made(ref):
        return Picture(ref, cache(lambda: _drawn(ref)))
    if _URL.match(ref):
        return Picture(ref, cache(lambda: _fetched(ref)))
    path = Path(ref).expanduser()
    return Picture(ref, (path if path.is_absolute() else folder / path).read_bytes)


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("picture: only base64 data: URLs are read")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"picture: the data: URL is not base64: {error}") from error


def _drawn(ref: str) -> bytes:
    out = io.BytesIO()
    try:
        draw(ref).save(out, "BMP")  # its bytes follow from the pixels alone; a PNG's also from zlib's version
    except NoriaError as error:
        raise ValueError(error.message) from error
    return out.getvalue()


def _fetched(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            data: bytes = file.read()
    except Exception as error:  # each file system of fsspec has errors of its own
        raise ValueError(f"picture {url} cannot be fetched: {type(error).__name__}: {error}") from error
    return data
