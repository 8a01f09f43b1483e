"""Pictures as rows name or embed them, turned into references that any `LoadImage` understands.

Comes in: a value of a row (path, URL, bytes, `{"bytes", "path"}`, a PIL picture) and the place of its file. Goes out:
a reference. Must not import torch, transformers or `serve`.

A relative path is looked for beside the file. A row that came over the network may name other things on the network
and embed bytes, but never a file of this machine.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image as Pillow

from noria.blobs import Blobs
from noria.errors import InvalidRequest
from noria.records import BLOB_SCHEME
from noria.scenes import is_made

KeepImage = Callable[[bytes, str], str]
"""Stores a picture's bytes (second: its media type) and returns its reference."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NETWORK = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def as_data_url(data: bytes, media_type: str) -> str:
    """The picture as a reference that carries its own bytes: what is used where there is no store."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def into(blobs: Blobs) -> KeepImage:
    """Keeps pictures in the store of blobs: data that carry theirs would fill the memory otherwise."""
    return lambda data, media_type: blobs.put(data, media_type).sha256


def from_data_url(url: str) -> bytes:
    """The bytes that a `data:` URL carries (RFC 2397). Raises ValueError where they are not base64, as it says."""
    head, _, body = url.partition(",")
    return base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)


@dataclass
class Place:
    """Where a row stands. `file` is for reports; `folder` is a path or URL that relative pictures start from, or None.

    `stored` maps the SHA-256 of pictures that came in the same file to their references.
    """

    file: str
    folder: str | None = None
    keep_image: KeepImage = as_data_url
    stored: dict[str, str] = field(default_factory=dict)

    def reference(self, value: Any) -> str:
        """The reference of one picture. Raises InvalidRequest saying what is wrong with it."""
        if isinstance(value, bytes):
            return self.embedded(value)
        if isinstance(value, Pillow.Image):
            sink = BytesIO()
            value.save(sink, format="PNG")
            return self.keep_image(sink.getvalue(), "image/png")
        if isinstance(value, Mapping):
            return self._described(value)
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"a picture is {type(value).__name__} {value!r:.40}, not a path, URL or bytes")
        return self._named(value)

    def embedded(self, data: bytes) -> str:
        """Keeps bytes that stood in the row. Raises InvalidRequest when they are no picture."""
        try:
            with Pillow.open(BytesIO(data)) as picture:
                media_type = picture.get_format_mimetype() or "application/octet-stream"
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise InvalidRequest(f"an embedded picture of {len(data)} bytes cannot be read: {error}") from error
        return self.keep_image(data, media_type)

    def _described(self, value: Mapping[str, Any]) -> str:
        if value.get("bytes"):
            return self.embedded(bytes(value["bytes"]))
        if isinstance(value.get("base64"), str):
            try:
                return self.embedded(base64.b64decode(value["base64"], validate=True))
            except binascii.Error as error:
                raise InvalidRequest(f"a picture's base64 cannot be read: {error}") from error
        for key in ("url", "path", "image_url", "image"):
            if value.get(key):
                return self.reference(value[key])
        raise InvalidRequest(f"a picture has neither bytes nor url nor path (its keys: {', '.join(map(str, value))})")

    def _named(self, value: str) -> str:
        name = value.removeprefix(BLOB_SCHEME)
        if _SHA256.fullmatch(name):
            return self.stored.get(name, name)
        if is_made(value):
            return value
        if value.startswith("data:"):
            try:
                return self.embedded(from_data_url(value))
            except ValueError as error:
                raise InvalidRequest(f"a picture's data: URL cannot be read: {error}") from error
        scheme = value.partition("://")[0].lower() if _SCHEME.match(value) else None
        if scheme in _NETWORK or (scheme not in (None, "file", "local") and not self._remote):
            return value
        if self._remote:
            if scheme is not None or self.folder is None:
                raise InvalidRequest(
                    f"picture {value!r} is a file of this machine, which data from elsewhere may not name"
                )
            return f"{self.folder.rstrip('/')}/{value.lstrip('/')}"
        path = Path(self.folder or ".") / re.sub(r"^file://", "", value, flags=re.IGNORECASE)
        if not path.is_file():
            raise InvalidRequest(f"picture {value!r} is not there (looked for {path})")
        return str(path)

    @property
    def _remote(self) -> bool:
        return self.folder is None or bool(_SCHEME.match(self.folder))


class Pictures:
    """A row's list of pictures, handed out in order to the placeholders of its texts."""

    def __init__(self, place: Place, values: Any) -> None:
        """`values`: a list of pictures, a single one, or None."""
        if values is None:
            values = []
        elif isinstance(values, str | bytes | Mapping | Pillow.Image) or not isinstance(values, Iterable):
            values = [values]
        self._references: Iterator[str] = iter([place.reference(value) for value in values])
        self.place = place

    def take(self) -> str:
        """The next picture. Raises InvalidRequest when the texts ask for more than there are."""
        found = next(self._references, None)
        if found is None:
            raise InvalidRequest("the texts show more pictures than the row has")
        return found

    def rest(self) -> list[str]:
        """Those that no placeholder asked for."""
        return list(self._references)
