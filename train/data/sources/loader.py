"""Pixels for references: stored blobs, and for rows of data also paths, URLs and what `noria.scenes` draws.

Comes in: a reference. Goes out: an RGB picture. The last ones used stay in memory, and on request as many others as fit
a number of bytes; what comes over the network is fetched once a process.

A reference that a user sent is not to be trusted: reading it could fetch any address that this machine reaches, or a
file of it. Captured conversations therefore show stored blobs or nothing; only rows of data that the operator named in
a recipe are read with `named`.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image as Pillow

from noria.errors import NoriaError, TrainingError
from noria.records import BLOB_SCHEME
from noria.scenes import draw, is_made
from train.data.formats.pictures import from_data_url
from train.data.render import decode_image
from train.data.sources.files import is_url

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 100


class ImageLoader:
    """A `LoadImage`. `read_blob` gives a stored picture's bytes by its SHA-256; `named` allows every other reference.

    The last `keep` pictures stay; beside them the first ones that fit into `memory` bytes of pixels stay for good, for
    training that comes back to each. Those would throw each other out were the oldest dropped: a pass reads all once.
    """

    def __init__(
        self, read_blob: Callable[[str], bytes] | None = None, *, named: bool = False, keep: int = 64, memory: int = 0
    ) -> None:
        self._read_blob = read_blob
        self._named = named
        self._keep = keep
        self._room = memory
        self._pixels: dict[str, tuple[tuple[int, int], bytes]] = {}
        self._pictures: OrderedDict[str, Pillow.Image] = OrderedDict()

    def __call__(self, reference: str) -> Pillow.Image:
        """The picture. Raises TrainingError naming the reference when it is gone or cannot be decoded."""
        if reference not in self._pictures:
            with _told(reference):
                self._pictures[reference] = self._load(reference)
            while len(self._pictures) > self._keep:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(reference)
        return self._pictures[reference]

    def read(self, reference: str) -> bytes:
        """The file that the picture is decoded from; what is drawn comes as PNG, which loses nothing.

        Raises as a call.
        """
        with _told(reference):
            if not (self._named and is_made(reference)):
                return self._bytes(reference)
            sink = BytesIO()
            draw(reference).save(sink, format="PNG")
            return sink.getvalue()

    def _load(self, reference: str) -> Pillow.Image:
        if reference in self._pixels:
            return Pillow.frombytes("RGB", *self._pixels[reference])
        made = self._named and is_made(reference)
        picture = draw(reference) if made else decode_image(self._bytes(reference))
        size = 3 * picture.width * picture.height
        if size <= self._room:
            self._room -= size
            self._pixels[reference] = (picture.size, picture.tobytes())
        return picture

    def _bytes(self, reference: str) -> bytes:
        name = reference.removeprefix(BLOB_SCHEME)
        if _SHA256.fullmatch(name):
            if self._read_blob is None:
                raise TrainingError("it is a stored picture, and no store of pictures was given")
            return self._read_blob(name)
        if not self._named or reference.startswith(BLOB_SCHEME):
            raise TrainingError("it is not stored, and what captured messages name is never fetched")
        if reference.startswith("data:"):
            return from_data_url(reference)
        if is_url(reference):
            return _fetched(reference)
        return Path(reference).read_bytes()


@contextmanager
def _told(reference: str) -> Iterator[None]:
    """Whatever goes wrong with a picture is told by its reference."""
    try:
        yield
    except Exception as error:  # file systems and decoders raise what their libraries do
        why = error.message if isinstance(error, NoriaError) else repr(error)
        raise TrainingError(f"picture {reference[:_SHOWN]} cannot be read: {why}", code="bad_image") from error


def _fetched(url: str) -> bytes:
    import fsspec

    with fsspec.open(f"simplecache::{url}", "rb") as stream:
        data: bytes = stream.read()
    return data
