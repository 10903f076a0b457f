"""A sheet of labelled training images, to check by eye that images and labels match."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.analysis.figure_style import check_figure_path, figure_style, save_figure
from pipelines.data.images.decode import BadImageError, EncodedImage, Pixels
from pipelines.data.images.image_sets import DecodedImages, ImageData, ImageSet, open_images
from pipelines.errors import AsgoError

_COLUMNS, _ROWS = 5, 4
_WIDTH, _HEIGHT = 1.5, 1.8  # of an image with its label, in inches
_ENOUGH = 300  # pixels per side: the drawn resolution
_LETTERS = 26  # characters per line below an image


def draw_contact_sheet(folder: Path, path: Path) -> tuple[str, ...]:
    """Draw the first training image of up to 20 classes, evenly spread over all, to `path` (.png, .pdf or .svg).

    The class's id and name are below each image. An image that cannot be decoded is an empty frame with the image's
    name. Returns a line about each such image. Raises `UsageError` for another file type, and the errors of
    `open_images` and of reading an image.
    """
    check_figure_path(path)
    data = open_images(folder)
    shown = _spread(data)
    problems = []
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with figure_style():
        figure = Figure(figsize=(_WIDTH * max(columns, 2), _HEIGHT * rows + 0.3), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).flatten()
        for cell, index in zip(cells, shown, strict=False):
            problems += _draw_image(cell, data, index)
        for unused in cells[len(shown) :]:
            unused.remove()
        figure.suptitle(f"First training images, {len(shown)} of {len(data.classes):,} classes", fontsize=9)
        save_figure(figure, path)
    return tuple(problems)


def _spread(data: ImageData) -> list[int]:
    """Return the indices of first images, for classes evenly spread over all that have images."""
    _, first = np.unique(data.train.labels, return_index=True)
    if not len(first):
        raise AsgoError(f"{data.folder}: contains no training images")
    places = np.linspace(0, len(first) - 1, min(_COLUMNS * _ROWS, len(first))).round().astype(int)
    return [int(index) for index in first[places]]


def _draw_image(axes: Axes, data: ImageData, index: int) -> list[str]:
    """Draw an image with its label; return a line if it cannot be decoded."""
    problems = []
    name = data.train.name(index)
    try:
        axes.imshow(_pixels(data.train, index))
    except BadImageError as error:
        problems.append(str(error))
        empty = name.replace("/", "/\n") + "\ncannot be decoded"
        axes.text(0.5, 0.5, empty, size=5.5, ha="center", va="center", transform=axes.transAxes, parse_math=False)
    # A square frame for wide and tall images aligns the labels in rows; the image is not stretched.
    axes.set(xticks=[], yticks=[], adjustable="datalim", box_aspect=1, facecolor="#f3f3f3")
    axes.spines[:].set_color("#d0d0d0")
    label = data.classes[data.train.labels[index]]
    words = textwrap.wrap(label.name, _LETTERS, max_lines=2, placeholder=" …") if label.name != label.id else []
    axes.set_xlabel("\n".join([label.id, *words]), fontsize=7, parse_math=False)
    return problems


def _pixels(images: ImageSet, index: int) -> Pixels:
    """Return the pixels of the image, decoded at a reduced size if that suffices for the sheet."""
    if isinstance(images, DecodedImages):
        return np.repeat(images.pixels[index], 3 // images.pixels.shape[3], axis=2)
    image = EncodedImage(images.read(index), images.name(index))
    return image.pixels(image.largest_shrink(max(image.height, image.width) / _ENOUGH))
