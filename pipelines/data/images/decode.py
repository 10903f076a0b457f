"""The bytes of a JPEG, or of a PNG by that name, to pixels."""

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
"""(height, width, 3), red, green and blue."""

# By other factors (libjpeg knows all eighths) decoding takes longer than at full size, for want of vector code.
_SHRINKS = (8, 4, 2)
MOST_PIXELS = 2**26
"""Of an image: its header sizes the memory that decoding takes, at most about 0.8 GB then, whatever the file is."""


class BadImageError(AsgoError):
    """An image that cannot be decoded; the message is one line with its name."""


class EncodedImage:
    """An image of which nothing but the header has been decoded.

    `height` and `width` are in pixels as they are stored: as for torchvision's `ImageFolder`, a note in the file that
    the camera was held upright changes nothing. simplejpeg decodes where it is installed, and Pillow what it leaves
    (CMYK, PNG, damaged files) or everything; both rest on libjpeg-turbo and give the same pixels.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """`name` is for messages. Raises `BadImageError` for what is no JPEG and no PNG, and for too many pixels."""
        self._data = data
        self._name = name
        self._opened: Image.Image | None = None
        size = _header(data)
        self._is_fast = size is not None
        self._is_jpeg = True
        if size is None:
            self._opened = self._open()
            self._is_jpeg = self._opened.format != "PNG"
            size = (self._opened.height, self._opened.width)
        self.height, self.width = size
        if self.height * self.width > MOST_PIXELS:
            sides = f"{self.width:,} x {self.height:,} pixels"
            raise BadImageError(f"{name}: this image claims {sides}, and at most {MOST_PIXELS:,} are decoded")

    def largest_shrink(self, wanted: float) -> int:
        """The largest of 1, 2, 4 and 8 times, but at most `wanted` times, that it can be decoded smaller by."""
        return next((shrink for shrink in _SHRINKS if self._is_jpeg and shrink <= wanted), 1)

    def pixels(self, shrink: int = 1) -> Pixels:
        """All pixels, decoded `shrink` times smaller: (ceil(height / shrink), ceil(width / shrink), 3).

        Raises `BadImageError` when the file is damaged or ends too early.
        """
        if self._is_fast:
            least = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
            try:
                decoded: Pixels = simplejpeg.decode_jpeg(self._data, **least)
                return decoded
            except ValueError:
                pass  # it is stricter than Pillow, whose word counts
        return np.array(self.picture(shrink))  # a copy: what Pillow lends cannot be written to, which torch warns of

    def picture(self, shrink: int = 1) -> Image.Image:
        """As `pixels`, by Pillow."""
        image = self._opened or self._open()
        self._opened = None  # once read, it cannot be read at another size
        try:
            if shrink > 1:
                image.draft(None, (self.width // shrink, self.height // shrink))
            return _in_colour(image)
        except Exception as error:
            raise self._bad(error) from None

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data), formats=("JPEG", "PNG"))
        except Exception as error:
            raise self._bad(error) from None

    def _bad(self, error: Exception) -> Exception:
        """What to raise: on damaged bytes Pillow fails in every way there is, from OSError to IndexError."""
        if isinstance(error, MemoryError):
            return error
        why = "is empty" if not self._data else f"cannot be decoded: {' '.join(str(error).split()) or repr(error)}"
        if isinstance(error, UnidentifiedImageError) and self._data:
            why = "is neither a JPEG nor a PNG"
        return BadImageError(f"{self._name}: this image {why} ({len(self._data):,} bytes)")


def _header(data: bytes) -> tuple[int, int] | None:
    """Height and width of what simplejpeg is to decode; None for what Pillow is to."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    return height, width


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        grey: NDArray[Any] = np.asarray(image)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")
