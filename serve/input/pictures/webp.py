"""WebP: the chunks of the RIFF file are walked, those that pixels come from are kept (RFC 9649).

Comes in: bytes. Goes out: `Container`, or Broken.
"""

from __future__ import annotations

from serve.input.pictures.container import Broken, Container, orientation_of, span

KEPT = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
ALPHA, ANIMATED = 0x10, 0x02  # flags of VP8X
MOST_CHUNKS = 1_000


def read_webp(data: bytes) -> Container:
    """EXIF, XMP, colour profiles and what follows the end are left out; of an animation the first frame is drawn."""
    end = min(len(data), 8 + int.from_bytes(span(data, 4, 4), "little"))
    kept, at, orientation, flags = [b""], 12, 1, 0
    canvas: tuple[int, int] | None = None
    still: tuple[int, int] | None = None
    for _ in range(MOST_CHUNKS):
        if at + 8 > end:
            break
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = span(data, at + 8, length)
        if kind == b"VP8X" and canvas is None and still is None:
            flags = span(body, 0, 10)[0]
            canvas = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
            kept.append(data[at : at + 8] + bytes([flags & ALPHA, 0, 0, 0]) + body[4:])
        elif kind == b"EXIF":
            orientation = orientation_of(body)
        elif kind in KEPT and still is None:
            kept.append(data[at : at + 8] + body + b"\0" * (length % 2))
            still = None if kind == b"ALPH" else _size(kind, body)
        at += 8 + length + length % 2
    else:
        raise Broken(f"has more than {MOST_CHUNKS} chunks")
    if flags & ANIMATED and canvas is not None:
        return Container(data, *canvas, orientation, redraw=True)
    if still is None or canvas not in (None, still):
        raise Broken("has no pixels, or not of the size that it names")
    body = b"WEBP" + b"".join(kept)
    clean = b"RIFF" + len(body).to_bytes(4, "little") + body
    return Container(data if clean == data else clean, *still, orientation)


def _size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L":  # RFC 9649, section 3.4
        bits = int.from_bytes(span(body, 1, 4), "little")
        if body[0] != 0x2F:
            raise Broken("has no lossless header")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if span(body, 3, 3) != b"\x9d\x01\x2a":  # RFC 6386, section 9.1
        raise Broken("does not begin with a key frame")
    head = span(body, 6, 4)
    return int.from_bytes(head[:2], "little") & 0x3FFF, int.from_bytes(head[2:], "little") & 0x3FFF
