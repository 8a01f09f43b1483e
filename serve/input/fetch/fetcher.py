"""Fetches a picture by http(s) so that a client cannot make the server call what the client itself could not.

Comes in: a URL. Goes out: at most `max_bytes` bytes, or NotFetched. Each host name is resolved once per hop, all that
it resolves to is looked at, and the connection goes to one of those very addresses: a name that says something else a
moment later (DNS rebinding) changes nothing. The name stays in `Host` and in TLS. No proxy, cookie or credential of the
environment is used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import httpcore

from noria.settings import ImageSettings
from serve.input.fetch.addresses import is_public
from serve.input.fetch.targets import NotFetched, Target, redirected, target_of

REDIRECTS = frozenset({301, 302, 303, 307, 308})
AT_ONCE = 16  # fetches of all requests together; the others wait, within their own time
HEADERS = ((b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"noria"))

Resolve = Callable[[str, int], Awaitable[list[str]]]
Dial = Callable[[str, int, float | None], Awaitable[httpcore.AsyncNetworkStream]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, by the system's resolver. Raises OSError.

    It reads what a client may spell as the connection would: `0x7f.1`, `017700000001` and `2130706433` are 127.0.0.1.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def dial(address: str, port: int, timeout_s: float | None) -> httpcore.AsyncNetworkStream:
    """A TCP connection to an address that was looked at."""
    return await httpcore.AnyIOBackend().connect_tcp(address, port, timeout=timeout_s)


class PublicOnly(httpcore.AsyncNetworkBackend):
    """httpcore's way out: resolves, looks at every address, and connects to those it looked at."""

    def __init__(self, resolve: Resolve, dial: Dial) -> None:
        self._resolve, self._dial = resolve, dial

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises NotFetched where the name leads anywhere that is not public, or nowhere: the two are told alike."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not all(is_public(address) for address in addresses):
            raise NotFetched("image_host", "is at a host that has no public address")
        last: Exception | None = None
        for address in addresses[:2]:
            try:
                return await self._dial(address, port, timeout)
            except (OSError, httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise NotFetched("image_fetch", "is at a host that does not answer") from last

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Never."""
        raise NotFetched("image_url", "is at a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        """For httpcore's retries."""
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches pictures within the limits. `resolve` and `dial` are the system's, unless a test brings its own."""

    def __init__(
        self,
        limits: ImageSettings,
        *,
        resolve: Resolve = resolve,
        dial: Dial = dial,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._limits = limits
        self._backend = PublicOnly(resolve, dial)
        self._tls = tls
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """The body that the address, or the last redirect, answers. Raises NotFetched."""
        target = target_of(url, self._limits)
        try:
            async with asyncio.timeout(self._limits.fetch_s), self._turns:
                return await self._follow(target)
        except TimeoutError as error:
            said = f"did not come within {self._limits.fetch_s:g} s (input.images.fetch_s)"
            raise NotFetched("image_fetch", said) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise NotFetched("image_fetch", f"could not be fetched ({type(error).__name__})") from error

    async def _follow(self, target: Target) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            found = await self._ask(target)
            if isinstance(found, bytes):
                return found
            target = redirected(target, found, self._limits)
        said = f"is redirected more than {self._limits.max_redirects} times (input.images.max_redirects)"
        raise NotFetched("image_fetch", said)

    async def _ask(self, target: Target) -> bytes | str:
        """The body, or where it is said to be."""
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
        )
        headers = [(b"Host", target.host_header.encode()), *HEADERS]
        if self._tls is None:
            self._tls = ssl.create_default_context()
        ways = httpcore.AsyncConnectionPool(
            ssl_context=self._tls, max_keepalive_connections=0, network_backend=self._backend
        )
        async with ways, ways.stream("GET", url, headers=headers) as answer:
            fields = {name.lower(): value for name, value in answer.headers}
            if answer.status in REDIRECTS and b"location" in fields:
                return fields[b"location"].decode("latin-1")
            if answer.status != 200:
                raise NotFetched("image_fetch", f"could not be fetched: its host answered {answer.status}")
            if fields.get(b"content-encoding", b"identity").lower() != b"identity":
                raise NotFetched("image_fetch", "came compressed, though that was not asked for")
            announced = fields.get(b"content-length", b"0")
            self._check_room(int(announced) if announced.isdigit() else 0)
            return await self._body(answer.aiter_stream())

    async def _body(self, chunks: AsyncIterator[bytes]) -> bytes:
        body = bytearray()
        async for chunk in chunks:
            body += chunk
            self._check_room(len(body))
        return bytes(body)

    def _check_room(self, size: int) -> None:
        if size > self._limits.max_bytes:
            said = f"has more than {self._limits.max_bytes} bytes (input.images.max_bytes)"
            raise NotFetched("image_bytes", said)
