"""GIF: blocks are walked up to the end of the first frame, which is what a model is shown (GIF89a specification).

Comes in: bytes. Goes out: `Container`, or Broken.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve.input.pictures.container import Broken, Container, span

EXTENSION, IMAGE, TRAILER, GRAPHIC_CONTROL = b"\x21", b"\x2c", b"\x3b", b"\xf9"
MOST_BLOCKS = 500_000  # pieces of data too; full ones have 255 bytes


def read_gif(data: bytes) -> Container:
    """Comments, applications' blocks (XMP among them) and all frames after the first are left out."""
    head = span(data, 0, 13)
    at = 13 + _table(head[10])
    kept, control, steps = [span(data, 0, at)], b"", iter(range(MOST_BLOCKS))
    for _ in steps:
        kind = span(data, at, 1)
        if kind == EXTENSION:
            end = _blocks(data, at + 2, steps)
            if span(data, at + 1, 1) == GRAPHIC_CONTROL:
                control = data[at:end]
            at = end
        elif kind == IMAGE:
            frame = span(data, at + 1, 9)
            end = _blocks(data, at + 10 + _table(frame[8]) + 1, steps)
            kept += [control, data[at:end], TRAILER]
            break
        else:
            raise Broken("has no frame" if kind == TRAILER else "has a block of no kind")
    else:
        raise Broken(f"has more than {MOST_BLOCKS} blocks")
    left, top, width, height = (int.from_bytes(frame[i : i + 2], "little") for i in range(0, 8, 2))
    screen = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    clean = b"".join(kept)
    size = max(screen[0], left + width), max(screen[1], top + height)  # a decoder widens the screen to its frame
    return Container(data if clean == data else clean, *size)


def _table(flags: int) -> int:
    """Bytes of the colour table that follows."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(data: bytes, at: int, steps: Iterator[int]) -> int:
    """The end of a chain of blocks, each behind its length, the last one empty; each takes one of the steps."""
    for _ in steps:
        length = span(data, at, 1)[0]
        at += 1 + length
        if not length:
            return at
    raise Broken(f"has more than {MOST_BLOCKS} blocks")
