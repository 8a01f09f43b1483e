"""From bytes that claim to be a picture to bytes that engine, store and trainer all read alike.

Comes in: a file as it was sent, and the limits. Goes out: `Admitted`, the same pixels, upright, and nothing beside
them; or Broken, TooMuch. A file that is upright and holds nothing else passes as it is, undecoded. Blocking: run it in
a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from noria.settings import ImageSettings
from serve.input.pictures.container import Broken, Container
from serve.input.pictures.gif import read_gif
from serve.input.pictures.jpeg import read_jpeg
from serve.input.pictures.png import SIGNATURE, read_png
from serve.input.pictures.webp import read_webp

if TYPE_CHECKING:
    from PIL.Image import Image

READERS: dict[str, Callable[[bytes], Container]] = {
    "png": read_png,
    "jpeg": read_jpeg,
    "webp": read_webp,
    "gif": read_gif,
}
PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})
REDRAWN_QUALITY = 95  # of a turned photograph; as PNG it would take ten times the room and a second to write


class TooMuch(Exception):
    """A picture is over a limit, or of a format that is not taken. `reason` is a word for programs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Admitted:
    """A picture as engine, store and trainer read it."""

    data: bytes
    media_type: str


def admit(data: bytes, limits: ImageSettings, spend: Callable[[int], None] = lambda pixels: None) -> Admitted:
    """The picture without what is not pixels. Raises TooMuch before anything is decoded, and Broken.

    `spend` is told its pixels and may raise TooMuch, too, on behalf of the whole request.
    """
    if len(data) > limits.max_bytes:
        raise TooMuch("image_bytes", f"has {len(data)} bytes, more than {limits.max_bytes} (input.images.max_bytes)")
    kind = format_of(data)
    if kind not in limits.formats:
        found = f"is {kind.upper()}" if kind else "is of no known format"
        raise TooMuch("image_format", f"{found}; taken are {', '.join(limits.formats)} (input.images.formats)")
    container = READERS[kind](data) if kind in READERS else _with_pillow(data, kind)
    _check_size(container.width, container.height, limits)
    spend(container.width * container.height)
    if container.redraw or container.orientation != 1:
        return _redrawn(container, kind)
    return Admitted(container.data, f"image/{kind}")


def format_of(data: bytes) -> str:
    """The format that a file's first bytes tell, or an empty text."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    known = (
        (SIGNATURE, "png"),
        (b"\xff\xd8\xff", "jpeg"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"BM", "bmp"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
    )
    return next((kind for magic, kind in known if data.startswith(magic)), "")


def _check_size(width: int, height: int, limits: ImageSettings) -> None:
    if width < 1 or height < 1:
        raise Broken(f"has no pixels: {width} x {height}")
    if max(width, height) > limits.max_side:
        said = f"is {width} x {height} pixels; its sides may have {limits.max_side} (input.images.max_side)"
        raise TooMuch("image_pixels", said)
    if width * height > limits.max_pixels:
        said = f"is {width} x {height}, {width * height} pixels; it may have {limits.max_pixels}"
        raise TooMuch("image_pixels", f"{said} (input.images.max_pixels)")


def _with_pillow(data: bytes, kind: str) -> Container:
    """Formats without a reader of our own: the header is Pillow's to read, which turns TIFF upright by itself."""
    with _opened(data, kind) as picture:
        return Container(data, *picture.size, redraw=True)


def _redrawn(container: Container, kind: str) -> Admitted:
    """The first frame, turned upright, in a file of its own: a JPEG as JPEG, everything else as PNG."""
    with _opened(container.data, kind) as source:
        source.load()
        picture = _upright(source, container.orientation)
    transparency = picture.info.get("transparency")
    picture.info = {} if transparency is None else {"transparency": transparency}
    out = BytesIO()
    if kind == "jpeg" and picture.mode in ("L", "RGB", "CMYK"):
        picture.save(out, "JPEG", quality=REDRAWN_QUALITY, subsampling=0)
        return Admitted(out.getvalue(), "image/jpeg")
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.save(out, "PNG", compress_level=3)
    return Admitted(out.getvalue(), "image/png")


def _upright(picture: Image, orientation: int) -> Image:
    """The picture as it is to be looked at: Exif 2.32, section 4.6.4, table 6."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture.copy()


class _opened:
    """Pillow over bytes of one format; whatever it finds wrong with them is Broken."""

    def __init__(self, data: bytes, kind: str) -> None:
        self._data, self._kind = data, kind

    def __enter__(self) -> Image:
        from PIL import Image as Pillow

        try:
            self._picture = Pillow.open(BytesIO(self._data), formats=(self._kind.upper(),))
        except Exception as error:
            raise _broken(error) from error
        return self._picture

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._picture.close()
        if isinstance(error, Exception) and not isinstance(error, Broken | TooMuch):
            raise _broken(error) from error


def _broken(error: Exception) -> Broken:
    """Decoders raise what they like over hostile bytes; none of it is more than a broken picture."""
    return Broken(f"cannot be decoded ({type(error).__name__})")
