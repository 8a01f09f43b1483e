"""Takes pictures out of messages: the bytes go to the blobs, the message keeps `noria-blob:SHA256`.

Comes in: OpenAI messages with data URLs. Goes out: messages without them, and the pictures. Runs in the writer
thread. Must not import vllm.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from noria.records import BLOB_SCHEME, Image, Json
from serve.input.pictures.admit import Admitted, format_of

NONE: Mapping[str, Admitted] = MappingProxyType({})
MEDIA = ("image_url", "video_url", "audio_url")


class BlobSink(Protocol):
    """What this module needs of `noria.blobs.Blobs`."""

    def put(self, data: bytes, media_type: str) -> Image:
        """Stores the bytes, once per content."""

    def exists(self, sha256: str) -> bool:
        """Whether they are there."""


def strip_images(
    messages: list[Json], blobs: BlobSink, replaced: Mapping[str, Admitted] = NONE
) -> tuple[list[Json], list[Image]]:
    """The messages with every data URL stored and replaced; the stored media in the order in which they appear.

    `replaced` has the pictures that the engine was given in another form than the URL's own: fetched, turned upright,
    without metadata. They are stored as the engine had them. A URL of another scheme stays as it is. One that cannot
    be decoded stays too: the engine has refused it or not. A part without a type, which vLLM takes, gets the one that
    its key says.
    """
    images: list[Image] = []
    stripped = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [_strip_part(part, blobs, images, replaced) for part in content]}
        stripped.append(message)
    return stripped, images


def _strip_part(part: Any, blobs: BlobSink, images: list[Image], replaced: Mapping[str, Admitted]) -> Any:
    if not isinstance(part, dict):
        return part
    for key in MEDIA:
        if key not in part:
            continue
        part = {"type": key, **part}
        value = part[key]
        url = value.get("url") if isinstance(value, dict) else value
        decoded = _bytes_of(url, replaced) if isinstance(url, str) else None
        if decoded is None:
            continue
        image = blobs.put(*decoded)
        images.append(image)
        reference = BLOB_SCHEME + image.sha256
        return {**part, key: {**value, "url": reference} if isinstance(value, dict) else {"url": reference}}
    return part


def _bytes_of(url: str, replaced: Mapping[str, Admitted]) -> tuple[bytes, str] | None:
    """What the engine was given, and what it is: told by the bytes where they tell it."""
    if url in replaced:
        return replaced[url].data, replaced[url].media_type
    decoded = decode_data_url(url)
    if decoded is None:
        return None
    kind = format_of(decoded[0])
    return decoded[0], f"image/{kind}" if kind else decoded[1]


def decode_data_url(url: str) -> tuple[bytes, str] | None:
    """Bytes and media type of a `data:` URL (RFC 2397); None where it is not one, or is broken."""
    if url[:5].lower() != "data:" or "," not in url:
        return None
    head, payload = url[5:].split(",", 1)
    media_type, *options = head.lower().split(";")
    try:
        data = base64.b64decode(payload) if "base64" in options else unquote_to_bytes(payload)
    except (binascii.Error, ValueError):
        return None
    return data, media_type or "application/octet-stream"
