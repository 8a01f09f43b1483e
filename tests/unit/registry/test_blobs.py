"""Blobs: stored once under their hash, whole or not at all, on a disk and elsewhere."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as Pillow

from noria.blobs import Blobs
from noria.errors import IntegrityError, NotFound, Unavailable
from noria.records import Image


def png(width: int = 5, height: int = 3, colour: str = "red") -> bytes:
    """A real picture."""
    file = BytesIO()
    Pillow.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture(params=["file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty place."""
    return Blobs(f"file://{tmp_path / 'blobs'}" if request.param == "file" else f"memory://{tmp_path}/blobs")


def test_a_picture_comes_back_under_its_hash(blobs: Blobs) -> None:
    data = png()
    image = blobs.put(data, "image/png")
    assert image == Image(hashlib.sha256(data).hexdigest(), "image/png", len(data), 5, 3)
    assert blobs.get(image.sha256) == data
    assert blobs.exists(image.sha256)
    assert blobs.put(data, "image/png") == image


def test_bytes_that_are_no_picture_are_kept_without_a_size(blobs: Blobs) -> None:
    image = blobs.put(b"GIF89a but not really", "image/gif")
    assert (image.width, image.height, image.size_bytes) == (None, None, 21)
    assert blobs.get(image.sha256) == b"GIF89a but not really"


def test_what_is_deleted_or_never_was_is_not_found(blobs: Blobs) -> None:
    image = blobs.put(png(), "image/png")
    blobs.delete(image.sha256)
    blobs.delete(image.sha256)
    for name in (image.sha256, "0" * 64, "../../etc/passwd", "", "A" * 64):
        assert not blobs.exists(name)
        blobs.delete(name)
        with pytest.raises(NotFound):
            blobs.get(name)


def test_a_name_from_outside_is_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    blobs = Blobs(f"file://{tmp_path / 'blobs'}")
    blobs.delete("../secret")
    with pytest.raises(NotFound):
        blobs.get("../secret")
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_damaged_picture_is_refused(tmp_path: Path) -> None:
    blobs = Blobs(f"file://{tmp_path / 'blobs'}")
    image = blobs.put(png(), "image/png")
    path = tmp_path / "blobs" / image.sha256[:2] / image.sha256
    damaged = bytearray(path.read_bytes())
    damaged[10] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=image.sha256):
        blobs.get(image.sha256)


def test_threads_that_store_the_same_picture_leave_one_file(tmp_path: Path) -> None:
    blobs = Blobs(f"file://{tmp_path / 'blobs'}")
    data = png(64, 64)
    with ThreadPoolExecutor(8) as pool:
        images = set(pool.map(lambda _: blobs.put(data, "image/png"), range(32)))
    assert len(images) == 1
    files = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in files] == [data]


def test_a_write_that_fails_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    blobs = Blobs(f"file://{tmp_path / 'blobs'}")
    monkeypatch.setattr("noria.blobs.os.fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        blobs.put(png(), "image/png")
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
