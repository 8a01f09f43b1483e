"""Takes an adapter off the wire and onto the disk.

Comes in: bytes in pieces of any size. Goes out: a folder with peft's two files, and the SHA-256 of what was sent.
Framing: eight bytes, the length of `adapter_config.json` as an unsigned little-endian number; that file; then
`adapter_model.safetensors` to the end. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable
from pathlib import Path
from typing import BinaryIO

from noria.errors import InvalidRequest
from serve.sampling.adapters.validate import CONFIG, WEIGHTS

LENGTH_BYTES = 8
MOST_CONFIG_BYTES = 2**20


async def receive(chunks: AsyncIterable[bytes], folder: Path, most_bytes: int) -> str:
    """Writes both files into `folder`, which must exist; the hash of everything sent. Raises InvalidRequest."""
    digest, head, sent = hashlib.sha256(), b"", 0
    config_bytes: int | None = None
    weights = await asyncio.to_thread((folder / WEIGHTS).open, "wb")
    try:
        async for chunk in chunks:
            sent += len(chunk)
            if sent > LENGTH_BYTES + MOST_CONFIG_BYTES + most_bytes:
                raise _broken(f"it is longer than the largest adapter that could be loaded ({most_bytes} bytes)")
            if config_bytes is None:
                head += chunk
                config_bytes, chunk = await _head(head, folder)
                if config_bytes is None:
                    continue
                digest.update(head[: LENGTH_BYTES + config_bytes])
            await asyncio.to_thread(_write, weights, digest, chunk)
    finally:
        await asyncio.to_thread(weights.close)
    if config_bytes is None:
        raise _broken(f"it ended after {sent} bytes, within {CONFIG}")
    return digest.hexdigest()


async def _head(head: bytes, folder: Path) -> tuple[int | None, bytes]:
    """The length of the configuration once it has arrived and is written, and what follows it."""
    if len(head) < LENGTH_BYTES:
        return None, b""
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if not 2 <= length <= MOST_CONFIG_BYTES:
        raise _broken(f"its first eight bytes announce {CONFIG} of {length} bytes")
    if len(head) < LENGTH_BYTES + length:
        return None, b""
    await asyncio.to_thread((folder / CONFIG).write_bytes, head[LENGTH_BYTES : LENGTH_BYTES + length])
    return length, head[LENGTH_BYTES + length :]


def _write(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    file.write(chunk)
    digest.update(chunk)


def _broken(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the upload is not an adapter: {why}; send the length of {CONFIG} in eight bytes, that file, then {WEIGHTS}",
        param="body",
        code="invalid_adapter",
    )
