"""Fetching: the address that was looked at is the one that is called, redirects are looked at, all is bounded."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import httpcore
import pytest

from noria.settings import ImageSettings
from serve.input.fetch.fetcher import Fetcher
from serve.input.fetch.files import read_file_url
from serve.input.fetch.targets import NotFetched
from tests.unit.input.material import Web, serving

PUBLIC_ADDRESS = "93.184.215.14"
PICTURE = b"bytes of a picture"
Answer = tuple[int, dict[str, str], bytes]


def answer(path: str) -> Answer:
    """A small site: pictures, redirects, and all that can be wrong with them."""
    if path.startswith("/loop"):
        return 302, {"location": f"/loop{int(path[5:]) + 1}"}, b""
    if path == "/slow":
        time.sleep(1.0)
    pages: dict[str, Answer] = {
        "/moved": (301, {"location": "/a.png?moved=1"}, b""),
        "/to-metadata": (302, {"location": "http://169.254.169.254/latest/meta-data/"}, b""),
        "/to-loopback": (307, {"location": "http://localhost/admin"}, b""),
        "/to-private-name": (302, {"location": "http://intranet.example.com/"}, b""),
        "/to-file": (302, {"location": "file:///etc/passwd"}, b""),
        "/missing": (404, {}, b"secret page"),
        "/large": (200, {"content-length": str(10**9)}, b"x"),
        "/endless": (200, {}, b"x" * 5_000_000),
        "/packed": (200, {"content-encoding": "gzip"}, b"x"),
    }
    return pages.get(path, (200, {"content-type": "text/html"}, PICTURE))


@pytest.fixture
def web() -> Iterator[Web]:
    """The site."""
    with serving(answer) as made:
        yield made


async def names(host: str, port: int) -> list[str]:
    """A resolver: literal addresses are themselves, intranets are private, everything else is public."""
    if host.replace(".", "").isdecimal():
        return [host]
    private = {"intranet.example.com": ["10.0.0.5"], "localhost": ["127.0.0.1"], "nowhere.example.com": []}
    return private.get(host, [PUBLIC_ADDRESS])


def fetcher(web: Web, **limits: object) -> Fetcher:
    settings = ImageSettings.model_validate({"fetch": "any-public", "max_bytes": 1_000_000, **limits})
    return Fetcher(settings, resolve=names, dial=web.dial)


async def test_a_picture_is_fetched_under_its_host_s_name(web: Web) -> None:
    """What the host says of its kind is not looked at."""
    assert await fetcher(web).fetch("http://images.example.com/a.png?x=1") == PICTURE
    assert web.calls == [("/a.png?x=1", "images.example.com")]


async def test_redirects_are_followed(web: Web) -> None:
    assert await fetcher(web).fetch("http://images.example.com/moved") == PICTURE
    assert [path for path, _ in web.calls] == ["/moved", "/a.png?moved=1"]


@pytest.mark.parametrize("path", ["/to-metadata", "/to-loopback", "/to-private-name", "/to-file"])
async def test_redirects_to_where_nobody_may_look_are_not(web: Web, path: str) -> None:
    with pytest.raises(NotFetched) as refused:
        await fetcher(web).fetch(f"http://images.example.com{path}")
    assert refused.value.reason in ("image_host", "image_url")
    assert [called for called, _ in web.calls] == [path]


async def test_redirects_have_an_end(web: Web) -> None:
    with pytest.raises(NotFetched, match="more than 2 times"):
        await fetcher(web, max_redirects=2).fetch("http://images.example.com/loop0")
    assert len(web.calls) == 3


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://intranet.example.com/",
        "http://nowhere.example.com/",
        "http://localhost/",
    ],
)
async def test_private_hosts_are_not_called_and_told_like_missing_ones(web: Web, url: str) -> None:
    with pytest.raises(NotFetched, match="no public address"):
        await fetcher(web).fetch(url)
    assert web.calls == []


async def test_a_real_server_on_loopback_is_not_called() -> None:
    """With the system's own resolver and network."""
    with serving(answer) as web:
        real = Fetcher(ImageSettings(fetch="listed", allowed_hosts=(f"localhost:{web.port}", f"127.0.0.1:{web.port}")))
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(NotFetched, match="no public address"):
                await real.fetch(f"http://{host}:{web.port}/a.png")
        assert web.calls == []


async def test_a_host_that_is_public_in_part_is_not_called(web: Web) -> None:
    async def both(host: str, port: int) -> list[str]:
        return [PUBLIC_ADDRESS, "10.0.0.5"]

    with pytest.raises(NotFetched, match="no public address"):
        await Fetcher(ImageSettings(fetch="any-public"), resolve=both, dial=web.dial).fetch("http://x.example.com/")
    assert web.calls == []


async def test_a_name_that_changes_its_mind_is_called_where_it_was_looked_at(web: Web) -> None:
    """DNS rebinding: the second answer would be loopback, but nobody asks twice."""
    asked, dialled = count(), []

    async def rebinding(host: str, port: int) -> list[str]:
        return [PUBLIC_ADDRESS] if next(asked) == 0 else ["127.0.0.1"]

    async def dial(address: str, port: int, timeout_s: float | None) -> httpcore.AsyncNetworkStream:
        dialled.append((address, port))
        return await web.dial(address, port, timeout_s)

    found = Fetcher(ImageSettings(fetch="any-public"), resolve=rebinding, dial=dial)
    assert await found.fetch("http://rebind.example.com/a.png") == PICTURE
    assert dialled == [(PUBLIC_ADDRESS, 80)] and next(asked) == 1


async def test_each_redirect_is_resolved_anew(web: Web) -> None:
    """And a name that has become private by then is not called."""
    asked = count()

    async def rebinding(host: str, port: int) -> list[str]:
        return [PUBLIC_ADDRESS] if next(asked) == 0 else ["127.0.0.1"]

    found = Fetcher(ImageSettings(fetch="any-public"), resolve=rebinding, dial=web.dial)
    with pytest.raises(NotFetched, match="no public address"):
        await found.fetch("http://rebind.example.com/moved")
    assert [path for path, _ in web.calls] == ["/moved"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/missing", "answered 404"),
        ("/large", "more than 1000000 bytes"),
        ("/endless", "more than 1000000 bytes"),
        ("/packed", "compressed"),
    ],
)
async def test_what_is_no_picture_to_take(web: Web, path: str, told: str) -> None:
    with pytest.raises(NotFetched, match=told) as refused:
        await fetcher(web).fetch(f"http://images.example.com{path}")
    assert "secret" not in str(refused.value)


async def test_time_is_bounded(web: Web) -> None:
    with pytest.raises(NotFetched, match=r"within 0\.2 s"):
        await fetcher(web, fetch_s=0.2).fetch("http://images.example.com/slow")


async def test_a_resolver_that_hangs_is_bounded_too(web: Web) -> None:
    async def hanging(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC_ADDRESS]

    slow = Fetcher(ImageSettings(fetch="any-public", fetch_s=0.1), resolve=hanging, dial=web.dial)
    with pytest.raises(NotFetched, match="did not come"):
        await slow.fetch("http://images.example.com/")


async def test_a_host_that_does_not_answer() -> None:
    async def refuse(address: str, port: int, timeout_s: float | None) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("refused")

    with pytest.raises(NotFetched, match="does not answer"):
        await Fetcher(ImageSettings(fetch="any-public"), resolve=names, dial=refuse).fetch("http://x.example.com/")


async def test_a_server_that_speaks_no_http() -> None:
    async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ready\r\n")
        writer.close()

    server = await asyncio.start_server(chat, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def dial(address: str, _: int, timeout_s: float | None) -> httpcore.AsyncNetworkStream:
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", port)

    async with server:
        with pytest.raises(NotFetched, match="could not be fetched"):
            await Fetcher(ImageSettings(fetch="any-public"), resolve=names, dial=dial).fetch("http://x.example.com/")


def test_files_of_one_folder(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "pictures", tmp_path / "private"
    for folder in (allowed / "deep", outside):
        folder.mkdir(parents=True)
        (folder / "a b.png").write_bytes(PICTURE)
    (allowed / "out").symlink_to(outside)
    (allowed / "escape.png").symlink_to(outside / "a b.png")
    (allowed / "within.png").symlink_to(allowed / "deep" / "a b.png")
    limits = ImageSettings(allowed_folder=allowed, max_bytes=100)
    for good in (
        f"file://{allowed}/deep/a%20b.png",
        f"file://localhost{allowed}/within.png",
        f"FILE://{allowed}/within.png",
    ):
        assert read_file_url(good, limits) == PICTURE
    os.mkfifo(allowed / "pipe")
    bad = [
        f"file://{outside}/a%20b.png",
        f"file://{allowed}/../private/a%20b.png",
        f"file://{allowed}/%2e%2e/private/a%20b.png",
        f"file://{allowed}/out/a%20b.png",
        f"file://{allowed}/escape.png",
        f"file://{allowed}/pipe",
        f"file://{allowed}/deep",
        f"file://{allowed}",
        f"file://{allowed}-other/x",
        f"file://evil.org{allowed}/within.png",
        f"file://{allowed}/within.png%00.png",
        "file:///etc/passwd",
        "file:///dev/zero",
        "file:relative.png",
        f"file://{allowed}/%ff",
    ]
    told = set()
    for url in bad:
        with pytest.raises(NotFetched) as refused:
            read_file_url(url, limits)
        told.add(str(refused.value))
    assert len(told) == 1  # whether there is such a file is not told
    (allowed / "large.png").write_bytes(bytes(101))
    with pytest.raises(NotFetched, match="more than 100 bytes"):
        read_file_url(f"file://{allowed}/large.png", limits)
    with pytest.raises(NotFetched, match="allowed_folder"):
        read_file_url(f"file://{allowed}/within.png", ImageSettings())
