"""Pictures: what passes as it is, what is cleaned, turned or refused; nothing is decoded before it is measured."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from noria.settings import ImageSettings
from serve.input.pictures.admit import Admitted, TooMuch, admit, format_of
from serve.input.pictures.container import Broken, orientation_of
from tests.unit.input.material import SECRET, chunk, encoded, exif, noise, png_bomb
from train.data.render import decode_image

LIMITS = ImageSettings(formats=("png", "jpeg", "webp", "gif", "bmp", "tiff"))
KINDS = ("PNG", "JPEG", "WEBP", "GIF")


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """As a viewer shows them."""
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_upright_picture_passes_untouched(kind: str) -> None:
    data = encoded(noise(), kind)
    assert admit(data, LIMITS) == Admitted(data, f"image/{kind.lower()}")
    assert admit(data, LIMITS).data is data


def test_modes_pass_untouched() -> None:
    for mode in ("RGBA", "LA", "L"):
        data = encoded(noise(mode=mode), "PNG")
        assert admit(data, LIMITS).data is data
    translucent = encoded(noise(mode="RGBA"), "WEBP", quality=60)
    assert admit(translucent, LIMITS).data is translucent
    progressive = encoded(noise(), "JPEG", progressive=True)
    assert admit(progressive, LIMITS).data is progressive


def with_metadata(kind: str) -> bytes:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Author", SECRET.decode())
        info.add_itxt("XML:com.adobe.xmp", SECRET.decode())
        return encoded(noise(), "PNG", pnginfo=info, exif=exif(1), icc_profile=SECRET)
    if kind == "GIF":
        return encoded(noise().convert("P"), "GIF", comment=SECRET)
    more = {"comment": SECRET} if kind == "JPEG" else {"lossless": True}
    return encoded(noise(), kind, exif=exif(1), xmp=SECRET, icc_profile=SECRET, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_left_out_and_the_pixels_stay(kind: str) -> None:
    data = with_metadata(kind)
    assert SECRET in data
    clean = admit(data, LIMITS)
    assert SECRET not in clean.data and clean.media_type == f"image/{kind.lower()}"
    assert np.array_equal(pixels(clean.data), pixels(data))
    assert admit(clean.data, LIMITS).data is clean.data


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_is_left_out(kind: str) -> None:
    """A file that is a picture and an archive or a page at once is a picture alone."""
    data = encoded(noise(), kind)
    assert admit(data + b"PK\x03\x04<script>alert(1)</script>", LIMITS).data == data


def test_what_pixels_do_not_come_from_is_left_out() -> None:
    """Segments and chunks that no decoder asks for, and what some carry beyond their own end."""
    jpeg, png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    unknown = b"\xff\xf0" + struct.pack(">H", 2 + len(SECRET)) + SECRET
    adobe = b"Adobe\0d\0\0\0\0\1"
    long = b"\xff\xee" + struct.pack(">H", 2 + len(adobe + SECRET)) + adobe + SECRET
    assert admit(jpeg[:2] + unknown + jpeg[2:], LIMITS).data == jpeg
    assert admit(jpeg[:2] + long + jpeg[2:], LIMITS).data == jpeg[:2] + b"\xff\xee\0\x0e" + adobe + jpeg[2:]
    assert admit(png[:-12] + chunk(b"IEND", SECRET), LIMITS).data == png


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_turned_picture_is_put_upright(kind: str, orientation: int) -> None:
    """As Pillow shows it: exactly, but for JPEG, which is written anew."""
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(64, 32), kind, exif=exif(orientation), **options)
    clean = admit(data, LIMITS)
    with Image.open(BytesIO(clean.data)) as picture:
        assert not picture.getexif() and SECRET not in clean.data
    wanted, found = pixels(data), pixels(clean.data)
    assert found.shape == wanted.shape == ((64, 32, 3) if orientation > 4 else (32, 64, 3))
    if kind == "JPEG" and orientation > 1:
        smooth = encoded(Image.linear_gradient("L").convert("RGB"), "JPEG", exif=exif(orientation), quality=95)
        difference = pixels(admit(smooth, LIMITS).data).astype(int) - pixels(smooth)
        assert np.abs(difference).max() <= 2
    else:
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
def test_trainer_and_engine_read_the_same_pixels(mode: str) -> None:
    """Bit for bit, of what is stored: transparency, palettes and turned files of old too."""
    from vllm.multimodal.media.image import ImageMediaIO

    for data in (
        encoded(noise(mode=mode), "PNG"),
        encoded(noise().convert("P"), "PNG", transparency=3),
        encoded(noise(), "PNG", transparency=(1, 2, 3)),
        encoded(noise(), "JPEG", exif=exif(6)),
        encoded(noise(), "WEBP", exif=exif(8)),
    ):
        for stored in (data, admit(data, LIMITS).data):
            seen = np.asarray(ImageMediaIO().load_bytes(stored).media)
            assert np.array_equal(np.asarray(decode_image(stored)), seen)


def test_what_the_engine_was_shown_is_what_training_reads(tmp_path: Path) -> None:
    """A turned photograph: the engine's pixels are the stored file's, and the trainer's."""
    from vllm.multimodal.media.image import ImageMediaIO

    from noria.blobs import Blobs

    admitted = admit(encoded(noise(64, 32), "JPEG", exif=exif(6)), LIMITS)
    blobs = Blobs(f"file://{tmp_path}")
    image = blobs.put(admitted.data, admitted.media_type)
    assert (image.width, image.height) == (32, 64)
    seen = np.asarray(ImageMediaIO().load_bytes(admitted.data).media)
    assert np.array_equal(np.asarray(decode_image(blobs.get(image.sha256))), seen)


def test_an_animation_is_its_first_frame() -> None:
    frames = [noise(seed=seed).convert("P") for seed in range(40)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=SECRET)
    clean = admit(gif, LIMITS)
    with Image.open(BytesIO(clean.data)) as picture:
        assert picture.n_frames == 1  # type: ignore[attr-defined]
    assert len(clean.data) < len(gif) / 20 and np.array_equal(pixels(clean.data), pixels(gif))
    webp = encoded(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)], lossless=True)
    assert admit(webp, LIMITS).media_type == "image/png"
    assert np.array_equal(pixels(admit(webp, LIMITS).data), pixels(encoded(noise(), "PNG")))


@pytest.mark.parametrize(
    "bomb",
    [
        png_bomb(60_000, 60_000),
        png_bomb(2**31 - 1, 2**31 - 1),
        encoded(noise(), "GIF")[:6] + struct.pack("<HH", 65535, 65535) + encoded(noise(), "GIF")[10:],
        encoded(noise(), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(noise(), "BMP")[26:],
        png_bomb(1, 1)[:33] + png_bomb(13_000, 13_000)[8:],  # decoders believe the second header
    ],
    ids=["png", "largest-png", "gif-screen", "bmp", "png-headers"],
)
def test_a_bomb_is_refused_before_it_is_decoded(bomb: bytes) -> None:
    tracemalloc.start()
    with pytest.raises((TooMuch, Broken)) as refused:
        admit(bomb, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert not isinstance(refused.value, TooMuch) or refused.value.reason == "image_pixels"


def test_a_jpeg_s_header_is_believed_before_it_is_decoded() -> None:
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(TooMuch, match="65000 x 65000"):
        admit(bytes(data), LIMITS)


def test_compressed_texts_are_never_unpacked() -> None:
    """A chunk of text that unpacks to gigabytes is left out as it is."""
    import zlib

    data = encoded(noise(), "PNG")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))
    at = data.index(b"IDAT") - 4
    assert admit(data[:at] + bomb + data[at:], LIMITS).data == data


@pytest.mark.parametrize(
    ("limits", "data", "told"),
    [
        (ImageSettings(max_bytes=100), encoded(noise(), "PNG"), "max_bytes"),
        (ImageSettings(max_pixels=2399), encoded(noise(), "PNG"), "60 x 40, 2400 pixels; it may have 2399"),
        (ImageSettings(max_side=59), encoded(noise(), "PNG"), "max_side"),
        (ImageSettings(), encoded(noise(), "BMP"), "is BMP; taken are png, jpeg, webp, gif"),
        (ImageSettings(formats=("png",)), encoded(noise(), "JPEG"), "is JPEG"),
        (ImageSettings(), b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
        (ImageSettings(), b"%PDF-1.7", "no known format"),
        (ImageSettings(), b"", "no known format"),
    ],
)
def test_limits_name_both_numbers_and_the_setting(limits: ImageSettings, data: bytes, told: str) -> None:
    with pytest.raises(TooMuch, match=told):
        admit(data, limits)


@pytest.mark.parametrize("kind", [*KINDS, "BMP", "TIFF"])
def test_broken_files_are_only_ever_broken(kind: str) -> None:
    """2000 times bytes are changed and the end is cut: refused, or passed to the decoder, and nothing else."""
    data, draw, seen = encoded(noise(30, 20), kind), random.Random(kind), Counter[str]()  # noqa: S311
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        if draw.random() < 0.3:
            del broken[draw.randrange(len(broken)) :]
        try:
            admit(bytes(broken), LIMITS)
            seen["admitted"] += 1
        except (Broken, TooMuch) as error:
            seen[type(error).__name__] += 1
    assert seen["Broken"] > 100 and sum(seen.values()) == 2000


HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP")


@given(st.binary(max_size=200), st.sampled_from(HEADS))
def test_any_bytes_behind_a_head_are_refused_cleanly(tail: bytes, head: bytes) -> None:
    with pytest.raises((Broken, TooMuch)):
        admit(head + tail, LIMITS)


@pytest.mark.parametrize("block", [b"\x21\xf9\0", b"\x01a"], ids=["extensions", "pieces"])
def test_a_gif_of_endless_blocks_is_refused(block: bytes) -> None:
    """Each is a step in Python; millions of them fit a file."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"\x21\xfe"
    with pytest.raises(Broken, match="more than 500000 blocks"):
        admit(head + (b"\x01a\0" if block[0] == 0x21 else b"") + block * 600_000, LIMITS)


def test_a_jpeg_with_endless_scans_is_refused() -> None:
    data = encoded(noise(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at : data.rindex(b"\xff\xd9")]
    with pytest.raises(Broken, match="more than 100 scans"):
        admit(data[:at] + scan * 200 + b"\xff\xd9", LIMITS)


@given(st.binary(max_size=64))
def test_orientation_of_anything(block: bytes) -> None:
    for head in (b"", b"Exif\0\0II*\0", b"MM\0*\0\0\0\x08\0\xff"):
        assert orientation_of(head + block) in range(1, 9)


def test_formats_are_told_by_the_bytes() -> None:
    assert [format_of(encoded(noise(), kind)) for kind in KINDS] == ["png", "jpeg", "webp", "gif"]
    assert format_of(b"RIFF0000WAVE") == ""
