"""The one way by which pictures come in: from the URL of a request to the bytes that engine and store both get.

Comes in: `data:`, `http(s):` and `file:` URLs. Goes out: `Admitted`, or InputRefused that says which picture and why.
Must not import vllm.
"""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode

from noria.settings import ImageSettings
from serve.input.fetch.fetcher import Fetcher
from serve.input.fetch.files import read_file_url
from serve.input.fetch.targets import NotFetched
from serve.input.intake import Intake, current_intake
from serve.input.pictures.admit import Admitted, TooMuch, admit
from serve.input.pictures.container import Broken
from serve.input.refusals import InputRefused, Refusals


class MediaDoor:
    """Admits pictures. What was refused is counted, and what was changed is noted in the request's intake."""

    def __init__(self, limits: ImageSettings, refusals: Refusals, fetcher: Fetcher | None = None) -> None:
        self.limits, self.refusals = limits, refusals
        self._fetcher = fetcher or Fetcher(limits)

    async def admit(self, url: str) -> Admitted:
        """The picture that the URL names, upright and without metadata. Raises InputRefused."""
        intake = current_intake.get()
        loop = asyncio.get_running_loop()
        try:
            if scheme_of(url) in ("http", "https"):
                sent = await self._fetcher.fetch(url)
                admitted = await loop.run_in_executor(None, self._cleaned, sent, intake)
            else:
                sent, admitted = await loop.run_in_executor(None, self._local, url, intake)
        except (NotFetched, TooMuch) as error:
            raise self.refused(url, error.reason, str(error), intake) from error
        except Broken as error:
            raise self.refused(url, "image_broken", str(error), intake) from error
        if intake is not None and (scheme_of(url) != "data" or admitted.data is not sent):
            return intake.replaced.setdefault(url, admitted)  # a host may say something else to each who asks
        return admitted

    def refused(self, url: str, reason: str, why: str, intake: Intake | None = None) -> InputRefused:
        """The error for one picture: its place in the request, and what is wrong with it."""
        intake = intake or current_intake.get()
        place = intake.place(url) if intake else None
        return self.refusals.refuse(reason, f"{place or 'a picture'}: the picture {why}", place)

    def _cleaned(self, sent: bytes, intake: Intake | None) -> Admitted:
        """The picture, after its pixels are counted among those of the request."""

        def spend(pixels: int) -> None:
            most = self.limits.max_request_pixels
            if intake is not None and not intake.spend(pixels, most):
                said = f"makes it more than {most} pixels in one request (input.images.max_request_pixels)"
                raise TooMuch("image_pixels", said)

        return admit(sent, self.limits, spend)

    def _local(self, url: str, intake: Intake | None) -> tuple[bytes, Admitted]:
        """What needs no network: the bytes as they were sent, and as they go on."""
        sent = read_file_url(url, self.limits) if scheme_of(url) == "file" else self._decoded(url)
        return sent, self._cleaned(sent, intake)

    def _decoded(self, url: str) -> bytes:
        """The bytes of a `data:` URL (RFC 2397), which must be base64 as vLLM's must."""
        head, comma, payload = url.partition(",")
        if scheme_of(url) != "data" or not comma or not head.lower().endswith(";base64"):
            raise NotFetched("image_url", "has an address that is no base64 data: URL, and none that is fetched")
        if len(payload) * 3 // 4 > self.limits.max_bytes + 2:
            raise TooMuch("image_bytes", f"has more than {self.limits.max_bytes} bytes (input.images.max_bytes)")
        try:
            return b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Broken("is not base64") from error


def scheme_of(url: str) -> str:
    """The URL's scheme in lower case."""
    return url.partition(":")[0].lower()
