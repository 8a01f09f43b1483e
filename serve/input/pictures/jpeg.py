"""JPEG: segments are walked up to the end of the image, those that pixels come from are kept (ITU-T T.81, annex B).

Comes in: bytes. Goes out: `Container`, or Broken.
"""

from __future__ import annotations

import re

from serve.input.pictures.container import Broken, Container, orientation_of, span

SOI, EOI, SOS, APP0, APP1, APP14, TEM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0x01
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; the three others define tables
TABLES = frozenset({0xC4, 0xCC, *range(0xDB, 0xE0)})  # Huffman, arithmetic, quantisation; lines, restarts
RESTARTS = frozenset(range(0xD0, 0xD8))
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data FF is followed by 00 or a restart's number
MOST_SCANS = 100  # each runs over all pixels; progressive files have some ten
MOST_SEGMENTS = 10_000
PLAIN_JFIF = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"  # no density, no thumbnail
ADOBE = 12  # bytes, of which the last says how colours are meant


class _Walk:
    """One pass over a file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.kept = data, list[bytes | memoryview]([b"\xff\xd8"])
        self.size: tuple[int, int] | None = None
        self.orientation: int | None = None
        self.scans = 0

    def segment(self, marker: int, at: int) -> int:
        """Takes the segment whose marker ends at `at`; where the next marker is looked for."""
        length = int.from_bytes(span(self.data, at, 2), "big")
        if length < 2:
            raise Broken("has a segment without its length")
        body = span(self.data, at + 2, length - 2)
        whole = b"\xff" + bytes([marker]) + self.data[at : at + length]
        if marker in FRAMES:
            self._frame(body)
        if marker == APP1 and body.startswith(b"Exif\0\0") and self.orientation is None:
            self.orientation = orientation_of(body)
        if marker == SOS:
            return self._scan(whole, at + length)
        if marker == APP0 and body.startswith(b"JFIF\0"):
            thumbnail = len(body) > len(PLAIN_JFIF)
            self.kept.append(b"\xff\xe0\0\x10" + PLAIN_JFIF if thumbnail else whole)
        elif marker == APP14 and body.startswith(b"Adobe"):
            self.kept.append(whole if len(body) <= ADOBE else b"\xff\xee\0\x0e" + body[:ADOBE])
        elif marker in FRAMES or marker in TABLES:
            self.kept.append(whole)
        return at + length

    def _frame(self, body: bytes) -> None:
        if self.size is not None:
            raise Broken("has two headers")
        head = span(body, 0, 6)
        self.size = int.from_bytes(head[3:5], "big"), int.from_bytes(head[1:3], "big")

    def _scan(self, head: bytes, begin: int) -> int:
        self.scans += 1
        if self.size is None:
            raise Broken("has pixels before its header")
        if self.scans > MOST_SCANS:
            raise Broken(f"has more than {MOST_SCANS} scans")
        found = NEXT_MARKER.search(self.data, begin)
        end = found.start() if found else len(self.data)  # without an end: the decoder says whether pixels are missing
        self.kept += [head, memoryview(self.data)[begin:end]]
        return end


def read_jpeg(data: bytes) -> Container:
    """EXIF, GPS, XMP, profiles, comments, thumbnails and whatever follows the end of the image are left out."""
    walk, at = _Walk(data), 2
    for _ in range(MOST_SEGMENTS):
        if at >= len(data) and walk.scans:
            break
        if span(data, at, 1) != b"\xff":
            raise Broken("has bytes between its segments")
        marker = span(data, at + 1, 1)[0]
        if marker == 0xFF:  # padding
            at += 1
        elif marker == EOI:
            walk.kept.append(b"\xff\xd9")
            break
        elif marker in RESTARTS or marker in (TEM, SOI, 0):
            raise Broken("has a marker where it cannot be")
        else:
            at = walk.segment(marker, at + 2)
    else:
        raise Broken(f"has more than {MOST_SEGMENTS} segments")
    if walk.size is None or not walk.scans:
        raise Broken("has no pixels")
    whole = sum(map(len, walk.kept)) == len(data)  # a piece is as it was, or shorter
    return Container(data if whole else b"".join(walk.kept), *walk.size, walk.orientation or 1)
