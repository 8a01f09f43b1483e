"""Pictures of every kind that the tests of input need, made in place; and a web server that is not public.

Goes out: bytes of files, and `Web`, which counts who called.
"""

from __future__ import annotations

import struct
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import httpcore
import numpy as np
from PIL import Image

SECRET = b"Camera of Ada, 59.9139 N"


def noise(width: int = 60, height: int = 40, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of which no two corners are alike."""
    bands = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    values = np.random.default_rng(seed).integers(0, 255, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode) if mode != "RGB" else Image.fromarray(values)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file."""
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    """Metadata with a camera's name in it, and which way is up."""
    made = Image.Exif()
    made[0x0112] = orientation
    made[0x010F] = SECRET.decode()
    return made


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """The file as clients send it."""
    return f"data:{media_type};base64,{b64encode(data).decode()}"


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG whose header promises far more pixels than a machine has room for."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(rows * (1 + 3 * min(width, 4096))), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Web:
    """A web server on loopback. `calls` are the paths that were asked for, with their `Host`."""

    def __init__(self, answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> None:
        self.calls: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.calls.append((self.path, self.headers["Host"]))
                status, fields, body = answer(self.path)
                self.send_response(status)
                for name, value in fields.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    async def dial(self, address: str, port: int, timeout_s: float | None) -> httpcore.AsyncNetworkStream:
        """Stands for the network: whichever public address is called, this server answers."""
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout=timeout_s)


@contextmanager
def serving(answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> Iterator[Web]:
    """A `Web` for as long as the block runs."""
    with Web(answer) as web:
        yield web
