"""vLLM's way to media, replaced: on every route and both wires a picture comes in through `serve.input.media` alone.

Comes in: URLs of parsed requests, in the request's own task. Goes out: the decoded picture that vLLM (0.31) expects,
made of the bytes that capture gets too. vLLM looks its connector up by the name in VLLM_MEDIA_CONNECTOR, which
`serve.engine.environment` sets; this module registers it, and imports vllm in a function only.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from serve.input.media import MediaDoor
from serve.input.refusals import InputRefused

CONNECTOR = "noria"
TRACING = ("vllm.entrypoints.anthropic.api_router",)  # logs a traceback for each request that it answers with 400
REFUSED = "is no picture: this server takes pictures, and no video, audio or tensors"


def register_connector(door: MediaDoor) -> None:
    """From now on vLLM loads media through the door."""
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.multimodal.media.connector import MediaConnector, global_thread_pool
    from vllm.multimodal.media.image import ImageMediaIO

    class NoriaMediaConnector(MediaConnector):
        """Pictures through the door; nothing is fetched, and no file is read, by vLLM itself."""

        async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
            """A picture, decoded beside the event loop. Raises InputRefused."""
            if not isinstance(media_io, ImageMediaIO):
                raise door.refused(url, "media_kind", REFUSED)
            admitted = await door.admit(str(url))
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    global_thread_pool, media_io.load_bytes, admitted.data
                )
            except Exception as error:  # the decoders raise what they like over a broken picture
                raise door.refused(url, "image_broken", f"cannot be decoded: {_reason(error)}") from error

        def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
            """The same for the few renderers of vLLM that have no asynchronous way."""
            return _in_thread(self.load_from_url_async(url, media_io))

        def fetch_image_embedding(self, data: str) -> Any:
            """Never: it would unpickle what a client sent."""
            raise door.refused(data, "media_kind", REFUSED)

        async def fetch_image_embedding_async(self, data: str) -> Any:
            """Never."""
            raise door.refused(data, "media_kind", REFUSED)

        fetch_audio_embedding = fetch_video_embedding = fetch_image_embedding
        fetch_audio_embedding_async = fetch_video_embedding_async = fetch_image_embedding_async

    MEDIA_CONNECTOR_REGISTRY.name2class[CONNECTOR] = NoriaMediaConnector
    for name in TRACING:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record tells anything but that a client sent what is refused; that is counted."""
    return not (record.exc_info and isinstance(record.exc_info[1], InputRefused))


def _reason(error: Exception) -> str:
    return str(error).removeprefix("Failed to load image: ")[:200]


def _in_thread(work: Any) -> Any:
    """Runs a coroutine to its end on a loop of its own: the caller's thread has one that is busy with the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="noria-media") as thread:
        return thread.submit(copy_context().run, asyncio.run, work).result()
