"""Decode image files to pixels: JPEG, PNG, WebP, BMP, GIF (the first frame), PPM and its kin, TIFF (the first page)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.errors import AsgoError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB; or (height, width, 1), gray."""

# libjpeg supports all multiples of 1/8, but other factors have no SIMD code and are slower than full size.
_SHRINKS = (8, 4, 2)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_JPEG = b"\xff\xd8\xff"
_STARTS = {
    _JPEG: ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"BM": ".bmp",
    b"GIF87a": ".gif",
    b"GIF89a": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    **{b"P%d%c" % (kind, space): ".ppm" for kind in range(1, 7) for space in b" \t\r\n"},
}
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of the names of images, in lower case. The content decides about the format."""
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
MOST_PIXELS = 2**26
"""Maximum size of an image. It limits the memory for decoding to about 0.8 GB, whatever the header claims."""


class BadImageError(AsgoError):
    """An image cannot be decoded; the message is one line with its name."""


def image_suffix(head: bytes) -> str | None:
    """Return the usual ending of the name of a file that begins with these 16 bytes; None if it is not an image."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in _STARTS.items() if head.startswith(start)), None)


class EncodedImage:
    """An image with only its header decoded.

    `height` and `width` are in pixels as stored: the EXIF orientation is ignored, as in torchvision's `ImageFolder`.
    `is_grey` is whether the image has no colours; its three channels are then equal.
    simplejpeg decodes JPEGs if it is installed; Pillow decodes what it cannot (CMYK, damaged files, other formats), or
    everything. Both use libjpeg-turbo and return the same pixels.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Decode the header; errors quote `name`. Raises `BadImageError` for other formats and for too many pixels."""
        self._data = data
        self._name = name
        self._opened: Image.Image | None = None
        size = _header(data)
        self._is_fast = size is not None
        self._is_jpeg = True
        if size is None:
            self._opened = self._open()
            self._is_jpeg = self._opened.format in ("JPEG", "MPO")
            size = (self._opened.height, self._opened.width, self._opened.mode in _GREY_MODES)
        self.height, self.width, self.is_grey = size
        for height, width in ((self.height, self.width), _tile(self._opened)):
            if height * width > MOST_PIXELS:
                sides = f"{width:,} x {height:,} pixels"
                raise BadImageError(f"{name}: this image has {sides}, more than the limit of {MOST_PIXELS:,}")

    def largest_shrink(self, wanted: float) -> int:
        """Return the largest factor of 1, 2, 4 and 8, at most `wanted`, by which the decoder can reduce the image."""
        return next((shrink for shrink in _SHRINKS if self._is_jpeg and shrink <= wanted), 1)

    def pixels(self, shrink: int = 1) -> Pixels:
        """Return all pixels, reduced by `shrink`: (ceil(height / shrink), ceil(width / shrink), 3).

        Raises `BadImageError` if the file is damaged or truncated.
        """
        if self._is_fast:
            least = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
            try:
                decoded: Pixels = simplejpeg.decode_jpeg(self._data, **least)
                return decoded
            except ValueError:
                pass  # simplejpeg is stricter than Pillow: Pillow decides
        return np.array(self.picture(shrink))  # a copy: Pillow's array is read-only, and torch warns of that

    def picture(self, shrink: int = 1) -> Image.Image:
        """Return the same as `pixels`, as a Pillow image."""
        image = self._opened or self._open()
        self._opened = None  # a Pillow image that was read cannot be read again at another size
        try:
            if shrink > 1:
                image.draft(None, (self.width // shrink, self.height // shrink))
            return _in_colour(image)
        except Exception as error:
            raise self._bad(error) from None

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data), formats=_FORMATS)
        except Exception as error:
            raise self._bad(error) from None

    def _bad(self, error: Exception) -> Exception:
        """Return the error to raise. On damaged bytes, Pillow raises many kinds, from OSError to IndexError."""
        if isinstance(error, MemoryError):
            return error
        why = "is empty" if not self._data else f"cannot be decoded: {' '.join(str(error).split()) or repr(error)}"
        if isinstance(error, UnidentifiedImageError) and self._data:
            why = "is no JPEG, PNG, WebP, BMP, GIF, PPM or TIFF"
        return BadImageError(f"{self._name}: this image {why} ({len(self._data):,} bytes)")


def damage(data: bytes, name: str) -> str | None:
    """Decode an image file; return the message of its `BadImageError`, or None. JPEGs are decoded at 1/8 size."""
    try:
        image = EncodedImage(data, name)
        image.pixels(image.largest_shrink(_SHRINKS[0]))
    except BadImageError as error:
        return str(error)
    return None


class RawImage:
    """An image of a `DecodedImages` set, with the methods of `EncodedImage`."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def largest_shrink(self, wanted: float) -> int:
        """Return 1: there is nothing to save."""
        return 1

    def pixels(self, shrink: int = 1) -> Pixels:
        """Return a copy of the pixels, (height, width, 1 or 3); they are mapped read-only, and torch warns of that."""
        return np.array(self._pixels)

    def picture(self) -> Image.Image:
        """Return the same as a Pillow image."""
        return picture_of(self._pixels)


def picture_of(pixels: Pixels) -> Image.Image:
    """Return pixels (height, width, 1 or 3) as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _header(data: bytes) -> tuple[int, int, bool] | None:
    """Return height, width and whether it is grey if simplejpeg can decode the image; None if Pillow must."""
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    return height, width, colours == "Gray"


def _tile(image: Image.Image | None) -> tuple[int, int]:
    """Return height and width of the tiles of a TIFF, which are decoded as a whole and may be larger than the image."""
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_LENGTH, 0), tags.get(_TILE_WIDTH, 0)
    return tile if all(isinstance(side, int) for side in tile) else (0, 0)


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point values")
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        grey: NDArray[Any] = np.asarray(image)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")
