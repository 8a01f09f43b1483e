"""What a reader of one file format tells about a picture, and how it says that a file is broken.

Comes in: nothing. Goes out: `Container`, `Broken`, and small helpers for reading bytes. Must not import Pillow: nothing
here decodes.
"""

from __future__ import annotations

from dataclasses import dataclass


class Broken(Exception):
    """The bytes are not a whole file of their format. The text ends the sentence "the picture ..."."""


@dataclass(frozen=True)
class Container:
    """A picture file, read without decoding it.

    `data` is the file with nothing left in it but what pixels are decoded from; it is the very object that came in
    where there was nothing else. `orientation` is EXIF's, 1 (upright) to 8. `redraw` says that the file cannot stay
    what it is, upright or not: it holds several frames, or the format has no reader that could clean it.
    """

    data: bytes
    width: int
    height: int
    orientation: int = 1
    redraw: bool = False


def span(data: bytes, begin: int, length: int) -> bytes:
    """`length` bytes from `begin`. Raises Broken where the file ends before."""
    if length < 0 or begin + length > len(data):
        raise Broken("is cut short")
    return data[begin : begin + length]


def orientation_of(exif: bytes) -> int:
    """The orientation (1 to 8) that an EXIF block names; 1 where it names none, or is no EXIF.

    Tag 0x0112 of the first directory: CIPA DC-008 (Exif 2.32), section 4.6.4.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1

    def number(begin: int, length: int) -> int:
        return int.from_bytes(tiff[begin : begin + length], "little" if order == "little" else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            found = number(entry + 8, 2)
            return found if 1 <= found <= 8 else 1
    return 1
