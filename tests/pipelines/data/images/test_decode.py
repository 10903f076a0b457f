"""Every kind of image that ImageNet holds comes out right, or is refused by name."""

from __future__ import annotations

import functools
import io
import math
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from pipelines.data.images import decode
from pipelines.data.images.decode import BadImageError, EncodedImage, Pixels, image_suffix

NAME = "n02105855/n02105855_2933.JPEG"


@functools.cache
def photograph() -> Image.Image:
    return Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def colour_png(pixels: Pixels, depth_bytes: int) -> bytes:
    """A PNG with 8 or 16 bits a channel, whose low bytes are noise: Pillow writes none of 16."""
    height, width, _ = pixels.shape
    wide = np.random.default_rng(0).integers(0, 256, (height, width, 3, depth_bytes), dtype=np.uint8)
    wide[..., 0] = pixels
    rows = np.hstack([np.zeros((height, 1), np.uint8), wide.reshape(height, -1)])
    header = struct.pack(">IIBBBBB", width, height, 8 * depth_bytes, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in chunks
    )


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the fast decoder, and where it is not installed."""
    if request.param == "Pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    elif decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return str(request.param)


JPEGS = {
    "colour at half resolution": encode(photograph(), subsampling=2, quality=90),
    "colour at full resolution": encode(photograph(), subsampling=0, quality=96),
    "progressive": encode(photograph(), progressive=True),
    "not transformed": encode(photograph(), keep_rgb=True),
    "odd size": encode(photograph().crop((0, 0, 333, 251))),
    "grey": encode(photograph().convert("L")),
    "CMYK": encode(photograph().convert("CMYK"), quality=96),
    "bytes behind its end": encode(photograph()) + b"\0" * 99,
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_have_the_pixels_that_pillow_gives(kind: str, decoder: str):
    image = EncodedImage(JPEGS[kind], NAME)
    expected = by_pillow(JPEGS[kind])
    assert (image.height, image.width, 3) == expected.shape
    np.testing.assert_array_equal(image.pixels(), expected)
    np.testing.assert_array_equal(image.pixels(), expected)
    np.testing.assert_array_equal(np.asarray(image.picture()), expected)


@pytest.mark.parametrize("inverted", [True, False])
def test_cmyk_is_not_taken_for_its_negative(inverted: bool, decoder: str):
    data = JPEGS["CMYK"]
    assert b"Adobe" in data
    if not inverted:  # Pillow takes all for inverted, as Adobe writes them: so do we, whatever the marker says
        data = data.replace(b"Adobe", b"Other")
    difference = EncodedImage(data, NAME).pixels().astype(int) - np.asarray(photograph())
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("kind", ["colour at half resolution", "odd size", "grey", "CMYK", "progressive"])
def test_a_jpeg_decodes_at_a_fraction_of_its_size(kind: str, shrink: int, decoder: str):
    image = EncodedImage(JPEGS[kind], NAME)
    size = (-(-image.height // shrink), -(-image.width // shrink))
    pixels = image.pixels(shrink)
    assert pixels.shape == (*size, 3)
    whole = Image.fromarray(by_pillow(JPEGS[kind]))
    box = (0, 0, size[1] * shrink, size[0] * shrink)
    expected = np.asarray(whole.crop(box).resize(size[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels - expected)[:-1, :-1].mean() < 4
    np.testing.assert_array_equal(image.pixels(), np.asarray(whole))


def test_both_decoders_give_the_same_pixels_at_a_fraction_of_the_size(monkeypatch: pytest.MonkeyPatch):
    fast = {(kind, shrink): EncodedImage(JPEGS[kind], NAME).pixels(shrink) for kind in JPEGS for shrink in (2, 4, 8)}
    monkeypatch.setattr(decode, "simplejpeg", None)
    for (kind, shrink), pixels in fast.items():
        np.testing.assert_array_equal(EncodedImage(JPEGS[kind], NAME).pixels(shrink), pixels)


@pytest.mark.parametrize(("wanted", "shrink"), [(0.3, 1), (1.99, 1), (2, 2), (3.99, 2), (4, 4), (7.9, 4), (100, 8)])
def test_it_is_not_made_smaller_than_is_wanted(wanted: float, shrink: int, decoder: str):
    assert EncodedImage(JPEGS["grey"], NAME).largest_shrink(wanted) == shrink
    assert EncodedImage(JPEGS["CMYK"], NAME).largest_shrink(wanted) == shrink
    assert EncodedImage(encode(photograph(), "PNG"), NAME).largest_shrink(wanted) == 1


def test_pngs_by_the_name_of_a_jpeg_are_read(decoder: str):
    pixels = np.asarray(photograph())[:100, :80]
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    half_clear = image.copy()
    half_clear.putalpha(Image.linear_gradient("L").resize(image.size))
    wide_grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    for data, expected in {
        encode(image, "PNG"): image,
        encode(image.quantize(200), "PNG"): image.quantize(200).convert("RGB"),
        encode(image.quantize(200), "PNG", transparency=3): image.quantize(200).convert("RGB"),
        encode(half_clear, "PNG"): image,
        encode(grey, "PNG"): grey.convert("RGB"),
        encode(grey.convert("1"), "PNG"): grey.convert("1").convert("RGB"),
        encode(wide_grey, "PNG"): grey.convert("RGB"),
        colour_png(pixels, 1): image,
        colour_png(pixels, 2): image,
    }.items():
        np.testing.assert_array_equal(EncodedImage(data, NAME).pixels(), np.asarray(expected))


def test_other_formats_have_the_pixels_of_their_first_frame(decoder: str):
    image = photograph().crop((0, 0, 80, 50))
    first = image.quantize(200)
    files = {
        encode(image, "WEBP", lossless=True): image,
        encode(image, "BMP"): image,
        encode(image, "PPM"): image,
        encode(first, "GIF", save_all=True, append_images=[image.rotate(180).quantize(200)]): first.convert("RGB"),
        encode(image, "TIFF", compression="tiff_lzw", save_all=True, append_images=[image.rotate(180)]): image,
        encode(image.convert("L"), "PPM"): image.convert("L").convert("RGB"),
    }
    for data, expected in files.items():
        assert image_suffix(data[:16])
        np.testing.assert_array_equal(EncodedImage(data, NAME).pixels(), np.asarray(expected))
    assert image_suffix(JPEGS["grey"][:16]) == ".jpg"
    assert not any(map(image_suffix, (b"", b"<html>404 Not Fo", b"RIFF\x10\0\0\0WAVEfmt ", b"P7 20 20")))


def test_what_has_no_colours_is_known(decoder: str):
    image = photograph().resize((20, 20))
    grey = image.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    files = [
        (image, "JPEG"),
        (image, "PNG"),
        (image.convert("CMYK"), "JPEG"),
        (image.quantize(9), "PNG"),
        (image, "BMP"),
    ]
    assert not any(EncodedImage(encode(each, kind), NAME).is_grey for each, kind in files)
    assert not EncodedImage(encode(image.convert("LAB"), "TIFF"), NAME).is_grey
    files = [(grey, "JPEG"), (grey, "PNG"), (grey.convert("LA"), "PNG"), (grey.convert("1"), "PNG"), (wide, "PNG")]
    for each, kind in files:
        opened = EncodedImage(encode(each, kind), NAME)
        assert opened.is_grey
        assert (np.ptp(opened.pixels().astype(int), axis=2) == 0).all()


def test_how_the_camera_was_held_changes_nothing_as_for_image_folder(decoder: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = EncodedImage(encode(photograph(), exif=exif), NAME)
    assert (image.height, image.width) == (600, 512)
    assert image.pixels().shape == (600, 512, 3)


BAD = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "an ICO": encode(photograph().resize((20, 20)), "ICO"),
    "half a WebP": encode(photograph(), "WEBP")[:9_000],
    "half a TIFF": encode(photograph(), "TIFF")[:50_000],
    "half a PPM": encode(photograph(), "PPM")[:50_000],
    "floating-point values": encode(Image.new("F", (20, 20), 0.5), "TIFF"),
    "its first two bytes": JPEGS["grey"][:2],
    "part of its header": JPEGS["grey"][:100],
    "half of it": JPEGS["progressive"][: len(JPEGS["progressive"]) // 2],
    "all but its end": JPEGS["colour at half resolution"][:-1000],
    "half a PNG": encode(photograph(), "PNG")[:50_000],
    "of 4 billion pixels": JPEGS["grey"].replace(struct.pack(">HH", 600, 512), struct.pack(">HH", 65000, 65000)),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_whole_image_is_refused_in_one_line_with_its_name(kind: str, decoder: str):
    with pytest.raises(BadImageError) as refused:
        EncodedImage(BAD[kind], NAME).pixels()
    assert str(refused.value).startswith(f"{NAME}: this image ")
    assert "\n" not in str(refused.value)


def test_the_reason_is_said(decoder: str):
    with pytest.raises(BadImageError, match=r": this image is empty \(0 bytes\)"):
        EncodedImage(b"", NAME)
    with pytest.raises(BadImageError, match=r": this image is no JPEG, PNG, WebP, BMP, GIF, PPM or TIFF \(26 bytes\)"):
        EncodedImage(BAD["text"], NAME)
    with pytest.raises(BadImageError, match=r"cannot be decoded: .*truncated.* \([\d,]+ bytes\)"):
        EncodedImage(BAD["half of it"], NAME).pixels()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_random_damage_gives_pixels_or_is_refused(kind: str, decoder: str):
    good = encode(photograph().resize((64, 48)), kind)
    chance = random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            image = EncodedImage(bytes(data), NAME)
            if image.height * image.width < 1e6:
                assert image.pixels().shape == (image.height, image.width, 3)
        except BadImageError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_an_image_that_claims_more_pixels_than_are_decoded_is_refused_by_its_header(decoder: str):
    side = math.isqrt(decode.MOST_PIXELS) + 1

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(BadImageError, match=r"has 8,193 x 8,193 pixels"):
        EncodedImage(png, NAME)


def test_a_tiff_with_tiles_larger_than_an_image_may_be_is_refused_by_its_header():
    def tiff(side: int) -> bytes:
        """16 x 16 grey pixels in one tile, compressed with LZW."""
        tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 9}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)).ljust(209, b"\x80")

    assert EncodedImage(tiff(16), NAME).height == 16
    with pytest.raises(BadImageError, match=r"has 40,000 x 40,000 pixels"):
        EncodedImage(tiff(40_000), NAME)
