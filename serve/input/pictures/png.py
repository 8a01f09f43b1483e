"""PNG: chunks are walked, those that pixels come from are kept (PNG specification, third edition, section 5).

Comes in: bytes. Goes out: `Container`, or Broken.
"""

from __future__ import annotations

from serve.input.pictures.container import Broken, Container, orientation_of, span

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
END = b"\0\0\0\0IEND\xaeB`\x82"
MOST_CHUNKS = 50_000


def read_png(data: bytes) -> Container:
    """Texts, times, colour profiles, EXIF, later frames of an animation and whatever follows the end are left out."""
    kept, at, orientation, pixels = [SIGNATURE], len(SIGNATURE), 1, False
    width, height = _size(data)
    for _ in range(MOST_CHUNKS):
        length, kind = int.from_bytes(span(data, at, 4), "big"), span(data, at + 4, 4)
        end = at + 12 + length
        if end > len(data):
            raise Broken("is cut short")
        if kind == b"IHDR" and at > len(SIGNATURE):  # decoders would believe its size
            raise Broken("has two headers")
        if kind == b"eXIf":
            orientation = orientation_of(data[at + 8 : end - 4])
        if kind in KEPT:
            kept.append(END if kind == b"IEND" else data[at:end])
            pixels |= kind == b"IDAT"
        at = end
        if kind == b"IEND":
            break
    else:
        raise Broken(f"has more than {MOST_CHUNKS} chunks")
    if not pixels:
        raise Broken("has no pixels")
    whole = sum(map(len, kept)) == len(data)
    return Container(data if whole else b"".join(kept), width, height, orientation)


def _size(data: bytes) -> tuple[int, int]:
    head = span(data, len(SIGNATURE), 25)
    if head[:8] != b"\0\0\0\x0dIHDR":
        raise Broken("does not begin with its header")
    return int.from_bytes(head[8:12], "big"), int.from_bytes(head[12:16], "big")
