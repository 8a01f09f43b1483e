"""Which addresses are called: never one that is not everybody's, however it is spelt."""

from __future__ import annotations

import pytest

from noria.settings import ImageSettings
from serve.input.fetch.addresses import is_public
from serve.input.fetch.fetcher import resolve
from serve.input.fetch.targets import NotFetched, Target, redirected, target_of

PUBLIC = ImageSettings(fetch="any-public")
LISTED = ImageSettings(fetch="listed", allowed_hosts=("images.example.com", "*.cdn.example.com", "example.org:8443"))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "100.100.100.200",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.170.2",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.7",
        "203.0.113.7",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
        "::ffff:169.254.169.254",
        "::ffff:8.8.8.8",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::7f00:1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:10::1",
        "2001:20::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%eth0",
        "fec0::1",
        "ff02::1",
        "localhost",
        "",
        "8.8.8.8.8",
    ],
)
def test_what_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00::1"]
)
def test_what_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0x0.0x0.0x1",
        "0x7f.1",
        "017700000001",
        "0177.0.0.1",
        "0177.0.0.0x1",
        "0",
        "0.0.0.0",  # noqa: S104
        "localhost",
        "169.254.43518",
        "2852039166",
        "0xA9FEA9FE",
        "0251.0376.0251.0376",
        "::1",
        "::ffff:127.0.0.1",
        "0:0:0:0:0:ffff:7f00:1",
    ],
)
async def test_every_spelling_of_an_address_is_that_address(host: str) -> None:
    """The resolver reads it, and what it says is looked at; what it cannot read leads nowhere."""
    try:
        found = await resolve(host, 80)
    except OSError:
        found = []
    assert not any(is_public(address) for address in found)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://images.example.com/a.png",
        "gopher://images.example.com/a.png",
        "HTTPX://images.example.com/a.png",
        "//images.example.com/a.png",
        "http:///a.png",
        "http://",
        "http:a.png",
        "http://user@images.example.com/a.png",
        "http://user:secret@images.example.com/a.png",
        "http://images.example.com@127.0.0.1/a.png",
        "http://images.example.com\\@127.0.0.1/a.png",
        "http://images.example.com\n.evil.org/a.png",
        "http://images.example.com/a.png\r\nX-Injected: 1",
        "http://images.example.com/\x00",
        " http://images.example.com/a.png",
        "http://images.example.com:99999/a.png",
        "http://images.example.com:port/a.png",
        "http://[::1/a.png",
        "http://[fe80::1%25eth0]/a.png",
        "http://" + "a" * 300 + ".com/a.png",
        "http://images.example.com/" + "a" * 9000,
        "http://.",
        "http://\u2028/",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(NotFetched) as refused:
        target_of(url, PUBLIC)
    assert refused.value.reason == "image_url"


def test_nothing_is_fetched_unless_a_setting_says_so() -> None:
    with pytest.raises(NotFetched, match=r"input\.images\.fetch"):
        target_of("https://images.example.com/a.png", ImageSettings())


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://images.example.com/a.png", True),
        ("http://IMAGES.example.com./a.png", True),
        ("https://images.example.com:443/a.png", True),
        ("https://images.example.com:8443/a.png", False),
        ("https://a.cdn.example.com/a.png", True),
        ("https://cdn.example.com/a.png", False),
        ("https://evilcdn.example.com/a.png", False),
        ("https://example.org:8443/a.png", True),
        ("https://example.org/a.png", False),
        ("https://images.example.com.evil.org/a.png", False),
        ("https://evil.org/?images.example.com", False),
        ("https://evil.org#images.example.com", False),
    ],
)
def test_listed_hosts(url: str, allowed: bool) -> None:
    if allowed:
        assert target_of(url, LISTED).host.endswith((".com", ".org"))
    else:
        with pytest.raises(NotFetched) as refused:
            target_of(url, LISTED)
        assert refused.value.reason == "image_host"


def test_any_public_host_is_called_at_the_web_s_ports_alone() -> None:
    assert target_of("http://example.com/a", PUBLIC).port == 80
    for port in (22, 25, 6379, 8080):
        with pytest.raises(NotFetched, match="80 nor 443"):
            target_of(f"http://example.com:{port}/a", PUBLIC)


def test_a_target_keeps_host_path_and_query() -> None:
    target = target_of("https://B\u00fccher.example/a b%20c/\u00e9?x=1&y=%2F#part".replace(" ", ""), PUBLIC)
    assert target == Target("https", "xn--bcher-kva.example", 443, "/ab%20c/%C3%A9?x=1&y=%2F")
    assert target.host_header == "xn--bcher-kva.example"
    assert Target("http", "example.com", 8080, "/").host_header == "example.com:8080"
    assert Target("http", "2606:4700::1", 80, "/").host_header == "[2606:4700::1]"


def test_redirects_are_checked_like_first_addresses() -> None:
    here = target_of("https://images.example.com/deep/a.png", LISTED)
    assert redirected(here, "../b.png?c=1", LISTED).path == "/b.png?c=1"
    for where in (
        "https://evil.org/a.png",
        "//evil.org/a.png",
        "file:///etc/passwd",
        "http://images.example.com/a.png",
    ):
        with pytest.raises(NotFetched):
            redirected(here, where, LISTED)
