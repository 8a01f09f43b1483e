"""What is let in: how large, how deep, which pictures, and from where.

Comes in: a tree. Goes out: frozen sections. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from noria.module_settings import Section

PictureFormat = Literal["png", "jpeg", "webp", "gif", "bmp", "tiff"]


class ImageSettings(Section):
    """The pictures of a request. All of it is checked before a picture is decoded."""

    formats: tuple[PictureFormat, ...] = ("png", "jpeg", "webp", "gif")
    """Formats that are taken, told by the bytes and not by what a request says of them."""
    max_bytes: int = Field(20 * 2**20, ge=1)
    """Largest picture file, in bytes."""
    max_pixels: int = Field(40_000_000, ge=1)
    """Most pixels of a picture, width times height."""
    max_side: int = Field(16_384, ge=1)
    """Longest side of a picture, in pixels."""
    max_count: int = Field(20, ge=1)
    """Most pictures in a request."""
    max_request_pixels: int = Field(160_000_000, ge=1)
    """Most pixels of all pictures of a request together: the engine's door holds them decoded, 3 bytes each."""
    fetch: Literal["off", "listed", "any-public"] = "off"
    """Whether the server fetches http(s) addresses: never, from `allowed_hosts` alone, or from any public address.
    Addresses that are not public (private, loopback, link-local, metadata) are never called."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that are fetched from: `images.example.com`, `*.example.com`, or one with a port, `example.com:8443`. A
    host without a port means the ports 80 and 443."""
    max_redirects: int = Field(3, ge=0, le=20)
    """Redirects that are followed; each is checked like the first address."""
    fetch_s: float = Field(10.0, gt=0, le=300)
    """Longest time for one fetch with its redirects, in seconds."""
    allowed_folder: Path | None = None
    """The folder that `file://` addresses may name pictures in; none refuses them all."""

    @model_validator(mode="after")
    def _hosts_fit_the_mode(self) -> Self:
        if self.fetch == "listed" and not self.allowed_hosts:
            raise ValueError("fetch='listed' needs allowed_hosts: name a host, or say fetch='off'")
        if self.fetch != "listed" and self.allowed_hosts:
            raise ValueError(f"allowed_hosts contradicts fetch={self.fetch!r}: hosts are only read with fetch='listed'")
        return self


class InputSettings(Section):
    """What a request may be."""

    max_body_bytes: int = Field(64 * 2**20, ge=1024)
    """Largest body on HTTP, in bytes. Pictures travel in it as base64, which is a third longer than the picture."""
    max_depth: int = Field(64, ge=8, le=190)
    """How deep the objects and lists of a body may nest. Protobuf has a limit of its own: 100 messages."""
    max_elements: int = Field(250_000, ge=100)
    """Most values in a body, each list's and object's counted."""
    images: ImageSettings = ImageSettings()
