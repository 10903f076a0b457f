"""Small archives in the shape of ImageNet's, good and bad ones, from the pictures that matplotlib ships."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.imagenet.archives import ARCHIVES, MD5SUMS

# Real ids and names. Their numbers in the kit below are in another order, as ImageNet's own are.
CLASSES = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n01770393": "scorpion",
    "n02119789": "kit fox",
    "n02123159": "tiger cat",
    "n02190166": "fly",
    "n02510455": "giant panda",
    "n03085013": "computer keyboard",
    "n04285008": "sports car",
    "n07747607": "orange",
}
Pixels = NDArray[np.uint8]


@functools.cache
def photographs() -> tuple[Pixels, ...]:
    """Ten pictures, (height, width, 3) each: six parts of a photograph, a scan, a terrain, a drawn box and a logo."""
    hopper = _pixels(Image.open(cbook.get_sample_data("grace_hopper.jpg")))
    height, width = hopper.shape[0] // 3, hopper.shape[1] // 2
    parts = [hopper[y * height :, x * width :][:height, :width] for y in range(3) for x in range(2)]
    with gzip.open(cbook.get_sample_data("s1045.ima.gz", asfileobj=False)) as file:
        scan = np.frombuffer(file.read(), dtype=np.uint16).reshape(256, 256)
    terrain = cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"]
    drawn = [
        _pixels(Image.open(cbook.get_sample_data(f"{name}.png"))) for name in ("Minduka_Present_Blue_Pack", "logo2")
    ]
    return (*parts, _grey(scan), _grey(terrain), *drawn)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def _grey(heights: NDArray[Any]) -> Pixels:
    low, high = np.percentile(heights, [1, 99])
    return np.repeat((255 * np.clip((heights - low) / (high - low), 0, 1)).astype(np.uint8)[..., None], 3, axis=2)


def picture(label: int, seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """A JPEG of `size` (width, height): a random part of the class's picture, mirrored, lighter or darker at random."""
    rng = np.random.default_rng([label, seed])
    whole = photographs()[label % len(photographs())]
    share = rng.uniform(0.6, 1.0)
    height, width = (int(share * length) for length in whole.shape[:2])
    top, left = rng.integers(whole.shape[0] - height + 1), rng.integers(whole.shape[1] - width + 1)
    part = whole[top : top + height, left : left + width]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    part = np.clip(part * rng.uniform(0.7, 1.3), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(part).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass
class Content:
    """What goes into the archives; a test may alter it. `train` is {wnid: {name: bytes}}, `validation` (wnid, bytes).

    `numbers` gives the classes their ILSVRC2012_ID; it need not be in the order of the ids.
    """

    train: dict[str, dict[str, bytes]]
    validation: list[tuple[str, bytes]]
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.numbers:
            order = np.random.default_rng(0).permutation(len(self.train)) + 1
            self.numbers = {wnid: int(number) for wnid, number in zip(self.train, order, strict=True)}


def pictures(classes: int = 3, train: int = 4, validation: int = 2, size: tuple[int, int] = (64, 48)) -> Content:
    """Pictures that a network can tell apart: so many of each class in each split."""
    wnids = list(CLASSES)[:classes]
    return Content(
        {
            wnid: {f"{wnid}_{100 * seed + 7}.JPEG": picture(label, seed, size) for seed in range(train)}
            for label, wnid in enumerate(wnids)
        },
        [(wnid, picture(label, train + seed, size)) for seed in range(validation) for label, wnid in enumerate(wnids)],
    )


def noise(classes: int, train: int, validation: int, largest: int, seed: int = 0) -> Content:
    """As `pictures`, but random bytes of random lengths, for whom bytes are enough."""
    rng = np.random.default_rng(seed)
    wnids = [f"n{10_000_000 + 17 * label:08d}" for label in range(classes)]
    return Content(
        {wnid: {f"{wnid}_{each}.JPEG": _noise(rng, largest) for each in range(train)} for wnid in wnids},
        [(wnid, _noise(rng, largest)) for _ in range(validation) for wnid in wnids],
    )


def _noise(rng: np.random.Generator, largest: int) -> bytes:
    return rng.bytes(int(rng.integers(1, largest)))


def write_archives(folder: Path, content: Content, *, kit: str = "meta.mat", digests: bool = True) -> Path:
    """Write the three archives, and their `md5sums.txt`, into `folder`. `kit` is "meta.mat", "map_clsloc.txt" or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {f"{wnid}.tar": tar_bytes(images) for wnid, images in content.train.items()}
    (folder / ARCHIVES["train"].file).write_bytes(tar_bytes(classes))
    validation = {
        f"ILSVRC2012_val_{number:08d}.JPEG": image for number, (_, image) in enumerate(content.validation, start=1)
    }
    (folder / ARCHIVES["val"].file).write_bytes(tar_bytes(validation))
    (folder / ARCHIVES["devkit"].file).write_bytes(gzip.compress(tar_bytes(kit_files(content, kit))))
    if digests:
        write_digests(folder)
    return folder


def write_digests(folder: Path) -> None:
    """Write `md5sums.txt` for the archives as they are now."""
    lines = [
        f"{hashlib.md5((folder / archive.file).read_bytes()).hexdigest()}  {archive.file}\n"
        for archive in ARCHIVES.values()
    ]
    (folder / MD5SUMS).write_text("".join(lines))


def kit_files(content: Content, kit: str) -> dict[str, bytes]:
    """The files of the development kit, by their names in it."""
    numbers = content.numbers
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in content.validation)
    files = {"data/ILSVRC2012_validation_ground_truth.txt": truth.encode(), "readme.txt": b"x"}
    if kit == "meta.mat":
        files["data/meta.mat"] = meta_mat(numbers)
    elif kit:
        files[f"data/{kit}"] = class_map(numbers).encode()
    return {f"ILSVRC2012_devkit_t12/{name}": each for name, each in files.items()}


def class_map(numbers: Mapping[str, int]) -> str:
    """`map_clsloc.txt`."""
    rows = sorted((number, wnid) for wnid, number in numbers.items())
    return "".join(f"{wnid} {number} {CLASSES.get(wnid, wnid).replace(' ', '_')}\n" for number, wnid in rows)


def meta_mat(numbers: Mapping[str, int]) -> bytes:
    """`meta.mat` with the fields of the official one, and like it with groups of classes behind the classes."""
    import scipy.io

    rows = [(number, wnid, CLASSES.get(wnid, wnid), 0) for wnid, number in numbers.items()]
    rows = [*sorted(rows), (len(rows) + 1, "n00001740", "entity", 2)]
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.empty((len(rows), 1), dtype=kinds)
    for place, (number, wnid, words, children) in enumerate(rows):
        synsets[place, 0] = (float(number), wnid, f"{words}, of its kind", "a thing", float(children), np.zeros(0))
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets}, do_compression=True)
    return file.getvalue()


def tar_bytes(
    files: Mapping[str, bytes], *, format: int = tarfile.GNU_FORMAT, more: Sequence[tarfile.TarInfo] = ()
) -> bytes:
    """A tar archive of `files`, and behind them of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in more:
            tar.addfile(entry)
    return buffer.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    """All files under `folder` with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
