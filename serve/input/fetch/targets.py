"""Which http(s) addresses are called: scheme, host and port, before any name is resolved.

Comes in: a URL of a request, or of a redirect. Goes out: a `Target`, or NotFetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from noria.settings import ImageSettings

DEFAULT_PORTS = {"http": 80, "https": 443}
LONGEST_URL = 8192


class NotFetched(Exception):
    """A picture's address is not called, or gave no picture. `reason` is a word for programs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Target:
    """What is asked of whom: `host` in ASCII and lower case, `path` with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """The `Host` field: the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The target again as a URL, for redirects that are relative to it."""
        return f"{self.scheme}://{self.host_header}{self.path}"


def target_of(url: str, limits: ImageSettings) -> Target:
    """The target that a URL names. Raises NotFetched where the settings do not allow it."""
    if limits.fetch == "off":
        raise NotFetched(
            "image_fetch_off",
            "is named by its address, and this server fetches none (input.images.fetch): send it as a data: URL",
        )
    parts = _split(url)
    host = _host(parts)
    try:
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except ValueError as error:
        raise _wrong("has no port that is a number") from error
    if limits.fetch == "listed" and not _listed(host, port, limits.allowed_hosts):
        raise NotFetched("image_host", "is at a host that is not in input.images.allowed_hosts")
    if limits.fetch == "any-public" and port not in DEFAULT_PORTS.values():
        raise NotFetched("image_host", "is at a port that is neither 80 nor 443")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='/?%:@!$&()*+,;=~-._')}" if parts.query else ""
    return Target(parts.scheme, host, port, path + query)


def redirected(target: Target, location: str, limits: ImageSettings) -> Target:
    """Where a redirect leads; checked like a first address, and never from https back to http."""
    found = target_of(urljoin(target.url, location), limits)
    if target.scheme == "https" and found.scheme == "http":
        raise NotFetched("image_host", "is redirected from https to http")
    return found


def _split(url: str) -> SplitResult:
    if len(url) > LONGEST_URL:
        raise _wrong(f"has more than {LONGEST_URL} characters")
    if any(ord(letter) <= 0x20 or ord(letter) == 0x7F for letter in url) or "\\" in url:
        raise _wrong("holds a space, a control character or a backslash")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _wrong("cannot be read") from error
    if parts.scheme not in DEFAULT_PORTS:
        raise _wrong("is neither a data:, http: nor https: URL")
    if "@" in parts.netloc:
        raise _wrong("holds a user or a password")
    return parts


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".")
    try:
        ascii_host = host.encode("ascii") if host.isascii() else host.encode("idna")
    except UnicodeError as error:
        raise _wrong("has a host that is no name") from error
    if not ascii_host or len(ascii_host) > 253 or "%" in host:
        raise _wrong("has no host")
    return ascii_host.decode().lower()


def _listed(host: str, port: int, allowed: tuple[str, ...]) -> bool:
    return any(_matches(host, port, one.lower()) for one in allowed)


def _matches(host: str, port: int, allowed: str) -> bool:
    name, colon, number = allowed.rpartition(":")
    if not (colon and number.isdecimal()):
        name, number = allowed, ""
    if port != int(number) if number else port not in DEFAULT_PORTS.values():
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _wrong(what: str) -> NotFetched:
    return NotFetched("image_url", f"has an address that {what}")
