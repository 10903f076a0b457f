"""Speed from photographs to batches, compared with torchvision's `ImageFolder` in torch's `DataLoader`."""

from __future__ import annotations

import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.benchmarks.imagenet_archives import tar_of, write_tar
from pipelines.benchmarks.turns import Contestant, Progress, in_turns
from pipelines.data.imagenet.archive_index import build_train_index
from pipelines.data.imagenet.devkit import Labels
from pipelines.data.images.image_sets import FolderImages, ImageSet, PackedImages
from pipelines.data.images.index import ImageClass
from pipelines.data.images.loader import TrainingImages
from pipelines.data.images.tar import open_tar
from pipelines.data.images.transforms import MEAN, STD, Normalize, build_transforms
from pipelines.data.images.workers import ImageSource, ImageWorkers, default_workers
from pipelines.errors import AsgoError, UsageError

TORCHVISION, FILES, ARCHIVES, EXACT = "torchvision", "asgo, files", "asgo, archives", "asgo, torchvision's pixels"
WIDTH, HEIGHT, SIZE = 500, 375, 208
BATCH_SIZE, BATCHES = 64, 24
"""Images per batch; batches per turn."""

_PHOTOGRAPHS = 128
_QUALITY = 95
_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class LoaderReport:
    """Results in images per second; the first contestant is torchvision.

    `largest_difference` and `mean_difference`, on a scale of 255, compare the pixels of one batch with torchvision's;
    `image_bytes` is the mean size of a file.
    """

    workers: int
    photographs: int
    image_bytes: float
    contestants: tuple[Contestant, ...]
    largest_difference: float
    mean_difference: float

    def speedup(self, name: str, over: str = TORCHVISION) -> float:
        """Return the speed relative to another contestant, median over the rounds."""
        by_name = {each.name: each for each in self.contestants}
        return by_name[name].speedup(by_name[over])

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "workers": self.workers,
            "photographs": self.photographs,
            "image_bytes": self.image_bytes,
            "largest_difference": self.largest_difference,
            "mean_difference": self.mean_difference,
            "archives_over_files": self.speedup(ARCHIVES, FILES),
            "loading": [
                {
                    "name": each.name,
                    "images_per_s": each.rates,
                    "images_per_s_a_core": each.median / max(1, self.workers),
                    "speedup": self.speedup(each.name),
                }
                for each in self.contestants
            ],
        }


def bench_loader(inputs: Sequence[Path], workers: int | None, repeats: int, progress: Progress) -> LoaderReport:
    """Measure the speed from photographs (500 x 375) to normalized float32 batches, by the paper's transform.

    `inputs` are photographs or folders of them; without them, crops of the photograph that matplotlib ships. They are
    written as JPEG files and also into an archive like ImageNet's. Every turn starts `workers` new processes (default:
    one per core). Time starts with the first batch, which excludes startup. Calls
    `progress(what, turns done, turns)`.

    Raises `UsageError` for an input that is not a photograph, or if torchvision is missing.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise UsageError("torchvision, the baseline here, is missing: pip install torchvision")
    workers = default_workers() if workers is None else workers
    with tempfile.TemporaryDirectory(prefix="asgo-bench-") as folder:
        photographs = list(_photographs(inputs))
        sets = _write_images(Path(folder), photographs)

        def rate(name: str) -> float:
            return _rate(_batches(name, Path(folder), sets, workers))

        ways = {name: partial(rate, name) for name in (TORCHVISION, FILES, ARCHIVES, EXACT)}
        contestants = tuple(Contestant(*each) for each in in_turns(ways, repeats, progress).items())
        differences = _differences(Path(folder), sets[FILES])
    mean_bytes = statistics.mean(map(len, photographs))
    return LoaderReport(workers, len(photographs), mean_bytes, contestants, *differences)


def _photographs(inputs: Sequence[Path]) -> Iterator[bytes]:
    """Yield JPEG files of 500 x 375: random crops of the photographs."""
    paths = [path for each in inputs for path in (sorted(each.rglob("*")) if each.is_dir() else [each])]
    paths = [path for path in paths if path in inputs or path.suffix.lower() in _SUFFIXES]
    if inputs and not paths:
        raise UsageError(f"{inputs[0]}: contains no photographs ({', '.join(sorted(_SUFFIXES))})")
    wholes = [_open(path) for path in paths[:_PHOTOGRAPHS] or [_sample()]]
    random = np.random.default_rng(0)
    for number in range(_PHOTOGRAPHS):
        whole = wholes[number % len(wholes)]
        scale = max(WIDTH / whole.width, HEIGHT / whole.height) * (random.uniform(1, 2) if number >= len(wholes) else 1)
        size = (max(WIDTH, round(scale * whole.width)), max(HEIGHT, round(scale * whole.height)))
        left, top = (int(random.integers(room + 1)) for room in (size[0] - WIDTH, size[1] - HEIGHT))
        file = io.BytesIO()
        part = whole.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + WIDTH, top + HEIGHT))
        part.save(file, "JPEG", quality=_QUALITY)
        yield file.getvalue()


def _sample() -> Path:
    from matplotlib import cbook

    return Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UsageError(f"{path}: not a readable photograph: {error.strerror or error}") from None


def _write_images(folder: Path, photographs: Sequence[bytes]) -> dict[str, ImageSet]:
    """Write every photograph into every class, as files and into an archive."""
    archive = folder / "train.tar"
    wnids = [f"n{10_000_000 + label:08d}" for label in range(BATCH_SIZE * BATCHES // len(photographs))]
    files = {wnid: [(f"{wnid}_{number:03d}.JPEG", each) for number, each in enumerate(photographs)] for wnid in wnids}
    for wnid in wnids:
        (folder / "train" / wnid).mkdir(parents=True)
        for name, photograph in files[wnid]:
            (folder / "train" / wnid / name).write_bytes(photograph)
    with archive.open("wb") as file:
        write_tar(file, ((f"{wnid}.tar", tar_of(files[wnid])) for wnid in wnids))
    labels = Labels(tuple(ImageClass(wnid, wnid) for wnid in wnids), ())
    with open_tar(archive) as opened:
        index = build_train_index(opened, labels, lambda phase, done, total: None)
    unpacked = FolderImages(folder / "train", index, wnids)
    return {FILES: unpacked, EXACT: unpacked, ARCHIVES: PackedImages(archive, index, wnids)}


def _batches(name: str, folder: Path, sets: dict[str, ImageSet], workers: int) -> Iterable[Tensor]:
    """Return normalized batches of all images, (64, 3, 208, 208) float32, in random order."""
    if name == TORCHVISION:
        return _torchvision_batches(folder, workers)
    return _our_batches(sets[name], workers, exact=name == EXACT)


def _torchvision_batches(folder: Path, workers: int) -> Iterator[Tensor]:
    loader = DataLoader(_reference(folder), BATCH_SIZE, shuffle=True, num_workers=workers)
    return (pixels for pixels, _ in loader)


def _reference(folder: Path) -> Any:
    from torchvision import datasets, transforms

    cut = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE)]
    to_values = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return datasets.ImageFolder(str(folder / "train"), transforms.Compose(cut + to_values))


def _our_batches(images: ImageSet, workers: int, exact: bool) -> Iterator[Tensor]:
    source = ImageSource(images, build_transforms("paper", SIZE)[0], exact=exact)
    normalize = Normalize()
    with ImageWorkers({"train": source}, workers) as started:
        training = TrainingImages(started, "train", BATCH_SIZE)
        for step in range(BATCHES):
            yield normalize(training.batch(step)[0])


def _rate(batches: Iterable[Tensor]) -> float:
    """Return the images per second after the first batch."""
    moments = []
    for batch in batches:
        if batch.shape != (BATCH_SIZE, 3, SIZE, SIZE) or batch.dtype != torch.float32:
            raise AsgoError(f"unexpected batch of shape {tuple(batch.shape)} and type {batch.dtype}")
        moments.append(time.perf_counter())
    return BATCH_SIZE * (len(moments) - 1) / (moments[-1] - moments[0])


def _differences(folder: Path, images: ImageSet) -> tuple[float, float]:
    """Return the largest and the mean difference, of 255, between our pixels and torchvision's, over a batch."""
    theirs = _reference(folder)
    source = ImageSource(images, build_transforms("paper", SIZE)[0])
    with ImageWorkers({"train": source}, 0) as here:
        part = here.start("train", [(0, index) for index in range(BATCH_SIZE)])
    values = Normalize()(part.pixels.permute(0, 3, 1, 2)) - torch.stack(
        [theirs[index][0] for index in range(BATCH_SIZE)]
    )
    difference = (values * torch.tensor(STD)[:, None, None] * 255).abs()
    return float(difference.max()), float(difference.mean())
