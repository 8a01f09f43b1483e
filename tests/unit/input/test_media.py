"""The way in of pictures: which are noted as changed, and how a refused one is told; ids that are no names."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from noria.blobs import Blobs
from noria.errors import NoriaError, NotFound, SettingsError
from noria.registry import Registry
from noria.settings import ImageSettings, load_settings
from noria.store import Store
from serve.capture.images import strip_images
from serve.input.fetch.fetcher import Fetcher
from serve.input.intake import Intake, current_intake
from serve.input.media import MediaDoor
from serve.input.pictures import admit as admitting
from serve.input.pictures.container import Container
from serve.input.refusals import InputRefused, Refusals
from serve.logs import KeyedFormatter
from serve.sampling.adapters.shelf import NAME
from tests.unit.input.material import SECRET, data_url, encoded, exif, noise, serving

NASTY = (
    "../../etc/passwd",
    "/etc/passwd",
    "v1/../v2",
    "v1\n",
    "v1\0",
    "..",
    "",
    "v01",
    "v1;rm -rf /",
    "$(id)",
    "a" * 300,
)


def message(url: str) -> dict[str, object]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}],
    }


async def test_what_is_stored_is_what_the_engine_was_given(tmp_path: Path) -> None:
    """A clean picture is stored from its URL; one that was cleaned, or fetched, as the engine had it."""
    clean, turned = data_url(encoded(noise(), "PNG")), data_url(encoded(noise(), "JPEG", exif=exif(6)))
    fetched, limits = encoded(noise(seed=2), "PNG"), ImageSettings(fetch="any-public")

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    with serving(lambda path: (200, {}, fetched)) as web:
        door = MediaDoor(limits, Refusals(), Fetcher(limits, resolve=resolve, dial=web.dial))
        urls = [clean, turned, "http://images.example.com/a.png"]
        messages = [message(url) for url in urls]
        intake = Intake(lambda: {"messages": messages})
        token = current_intake.set(intake)
        given = [await door.admit(url) for url in urls]
        current_intake.reset(token)
    assert set(intake.replaced) == {turned, "http://images.example.com/a.png"}
    assert intake.pixels == 3 * 2400
    blobs = Blobs(f"file://{tmp_path}")
    _, images = strip_images(messages, blobs, intake.replaced)
    assert [blobs.get(image.sha256) for image in images] == [one.data for one in given]
    assert [image.media_type for image in images] == ["image/png", "image/jpeg", "image/png"]
    assert (images[1].width, images[1].height) == (40, 60) and SECRET not in given[1].data


async def test_an_address_that_is_named_twice_is_one_picture() -> None:
    """However often its host changes its mind: capture knows pictures by their address."""
    limits, sent = ImageSettings(fetch="any-public"), iter([encoded(noise(seed=seed), "PNG") for seed in range(3)])

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    with serving(lambda path: (200, {}, next(sent))) as web:
        door = MediaDoor(limits, Refusals(), Fetcher(limits, resolve=resolve, dial=web.dial))
        intake = Intake(lambda: {})
        token = current_intake.set(intake)
        url = "http://images.example.com/a.png"
        given = await asyncio.gather(*(door.admit(url) for _ in range(3)))
        current_intake.reset(token)
    assert {one.data for one in given} == {intake.replaced[url].data}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (data_url(encoded(noise(), "PNG")[:-20]), "image_broken"),
        (data_url(b"GIF89a"), "image_broken"),
        (data_url(encoded(noise(), "BMP")), "image_format"),
        ("data:image/png;base64,????", "image_broken"),
        ("data:image/png;base64,AAA", "image_broken"),
        ("data:image/png;base64, AAAA", "image_broken"),
        ("data:image/png,AAAA", "image_url"),
        ("data:image/png", "image_url"),
        ("data:x,y;base64,AAAA", "image_url"),
        ("data:image/png;base64," + "A" * 60_000, "image_bytes"),
        ("http://127.0.0.1/", "image_fetch_off"),
        ("file:///etc/passwd", "image_file"),
        ("FILE:///etc/passwd", "image_file"),
        ("ftp://example.com/a", "image_url"),
        ("/etc/passwd", "image_url"),
        ("", "image_url"),
    ],
)
async def test_a_refused_picture_says_which_and_why(url: str, reason: str) -> None:
    door = MediaDoor(ImageSettings(max_bytes=40_000), Refusals())
    token = current_intake.set(Intake(lambda: {"messages": [message("data:other"), message(url)]}))
    with pytest.raises(InputRefused) as refused:
        await door.admit(url)
    current_intake.reset(token)
    assert refused.value.code == reason and door.refusals.counts == {reason: 1}
    if url:
        assert refused.value.param == "messages.1.content.1.image_url.url"
        assert refused.value.message.startswith("messages.1.content.1.image_url.url: the picture ")
    assert len(refused.value.message) < 300 and "AAAA" not in refused.value.message


@pytest.mark.parametrize("name", NASTY)
def test_no_name_of_a_request_becomes_a_path(tmp_path: Path, name: str) -> None:
    """Versions, pictures, adapters, jobs and completions."""
    (tmp_path / "secret").write_text("x")
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        registry, blobs = Registry(tmp_path / "models", store), Blobs(f"file://{tmp_path / 'blobs'}")
        for ask in (registry.path, registry.manifest, blobs.get, store.get_completion, store.get_job):
            with pytest.raises((NotFound, NoriaError)) as refused:
                ask(name)
            assert type(refused.value) is not NoriaError
        assert not blobs.exists(name)
    assert NAME.fullmatch(name) is None or "/" not in name


@pytest.mark.parametrize("word", [*NASTY, "a' OR 1=1 --", 'a"b', '"; DROP TABLE completions; --', "$.a[0]", "%", "]"])
def test_no_word_of_a_request_becomes_sql(tmp_path: Path, word: str) -> None:
    """Keys and values of metadata, users, annotators and ids are parameters: they find nothing, and break nothing."""
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        assert store.list_completions(limit=5, metadata={word: word}, model=word) == []
        assert store.list_preferences(limit=5, annotator=word) == []
        with pytest.raises(NotFound):
            store.get_completion(word)


def test_no_log_line_is_a_client_s() -> None:
    """Line ends, escapes of a terminal and separators are written as JSON writes them."""
    formatter = KeyedFormatter()
    for text in ("a\nERROR noria.server forged", "a\r\nb", "\x1b[2J", "a b", "a=b", 'a"b', "\u2028x", "", "\x00"):
        record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "event", "path": text})
        line = formatter.format(record)
        assert line.isprintable() and line.isascii()
    try:
        raise ValueError("a\n2026-01-01 ERROR forged \x1b[2J")
    except ValueError as error:
        record = logging.makeLogRecord({"name": "n", "msg": "event", "exc_info": (type(error), error, None)})
    lines = formatter.format(record).splitlines()
    assert all(line.startswith("  | ") and "\x1b" not in line for line in lines[1:]) and len(lines) == 3


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for images in ({"fetch": "listed"}, {"allowed_hosts": ["a"]}, {"fetch": "any-public", "allowed_hosts": ["a"]}):
        with pytest.raises(SettingsError, match="allowed_hosts"):
            load_settings(home=tmp_path, input={"images": images})


async def test_the_pictures_of_a_request_are_measured_together() -> None:
    """Each alone would do; the one that is too much is told, and a request of its own may have it."""
    limits = ImageSettings(max_request_pixels=5000)
    door, url = MediaDoor(limits, Refusals()), data_url(encoded(noise(), "PNG"))
    for asked in (2, 3):
        token = current_intake.set(Intake(lambda: {}))
        try:
            for number in range(asked):
                if number == 2:
                    with pytest.raises(InputRefused, match=r"more than 5000 pixels in one request"):
                        await door.admit(url)
                else:
                    await door.admit(url)
        finally:
            current_intake.reset(token)


async def test_a_picture_too_many_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels of a request are counted from the headers: what is over is never turned upright."""
    turned, redraw = data_url(encoded(noise(), "JPEG", exif=exif(6))), admitting._redrawn
    drawn: list[Container] = []

    def watched(container: Container, kind: str) -> admitting.Admitted:
        drawn.append(container)
        return redraw(container, kind)

    monkeypatch.setattr(admitting, "_redrawn", watched)
    door = MediaDoor(ImageSettings(max_request_pixels=5000), Refusals())
    token = current_intake.set(Intake(lambda: {}))
    try:
        said = await asyncio.gather(*(door.admit(turned) for _ in range(6)), return_exceptions=True)
    finally:
        current_intake.reset(token)
    assert sum(isinstance(one, InputRefused) for one in said) == 4
    assert len(drawn) == 2
