"""Worker processes that read, decode and resize images."""

from __future__ import annotations

import atexit
import os
import queue
import signal
import socket
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.child import begin_child, start_child
from pipelines.data.images.augmentation import Distortion, RandomShift
from pipelines.data.images.decode import BadImageError, EncodedImage, Pixels, RawImage
from pipelines.data.images.image_sets import DecodedImages, ImageSet
from pipelines.data.images.transforms import Transform, render
from pipelines.errors import AsgoError

OnBad = Literal["stop", "replace", "leave out"]
Row = tuple[int, int]
"""The epoch, which random transforms depend on, and the index of an image."""

_PIECE = 16  # images per request to a worker
_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class ImageSource:
    """Images, their transform, and the random changes after it.

    `on_bad`: an image that cannot be decoded stops the run, is replaced by the next good image, or is left out.
    """

    images: ImageSet
    transform: Transform
    seed: int = 0
    on_bad: OnBad = "stop"
    exact: bool = False
    """Whether pixels equal torchvision's bit for bit; see `render`."""
    shift: RandomShift | None = None
    distortion: Distortion | None = None

    def shape(self, rows: int) -> tuple[int, int, int, int]:
        """Return the shape of so many images: one channel for gray decoded ones; all others become RGB."""
        channels = self.images.pixels.shape[3] if isinstance(self.images, DecodedImages) else 3
        return rows, self.transform.size, self.transform.size, channels

    def pixels(self, used: int, epoch: int, index: int) -> Pixels:
        """Return the pixels of image `used`, (size, size, channels), transformed as `index` is in this epoch.

        Raises `BadImageError`.
        """
        key = (self.seed, epoch, index)
        image = self._image(used)
        pixels = render(image, self.transform.view(image.height, image.width, key), exact=self.exact)
        if self.shift is not None:
            whole, pixels = pixels[None], np.empty_like(pixels)
            self.shift.take(whole, np.array([0]), np.array([epoch]), np.array([index]), pixels[None])
        return pixels if self.distortion is None else self.distortion(pixels, key)

    def _image(self, index: int) -> EncodedImage | RawImage:
        if isinstance(self.images, DecodedImages):
            return RawImage(self.images.pixels[index])
        return EncodedImage(self.images.read(index), self.images.name(index))


@dataclass
class DecodedRows:
    """Result of decoding rows: `used` (rows,), the index of each row's image, or -1; `bad`, reasons by image name."""

    used: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PendingBatch:
    """Part of a batch in progress: pixels, uint8 (rows, size, size, channels), and the futures of its pieces."""

    pixels: Tensor
    pieces: Sequence[Future[DecodedRows]]

    def wait(self) -> DecodedRows:
        """Wait for all pieces. Raises the workers' errors."""
        decoded = DecodedRows()
        for piece in self.pieces:
            decoded.used += piece.result().used
            decoded.bad |= piece.result().bad
        return decoded

    def cancel(self) -> None:
        """Cancel the pieces that have not started."""
        for piece in self.pieces:
            piece.cancel()


def default_workers() -> int:
    """Return the number of CPU cores available to this process, divided among the ranks of a machine."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class ImageWorkers:
    """Processes that decode parts of batches from named sources; a context manager that ends them.

    Processes, not threads, although the decoders release the GIL: a single decoding thread halves the speed of a
    training loop that launches many small GPU kernels.
    """

    def __init__(self, sources: Mapping[str, ImageSource], workers: int | None = None, *, pinned: bool = False) -> None:
        """Start `workers` processes in the background; with 0, this process decodes all images itself.

        With `pinned`, batches are in pinned memory, so copies to a CUDA device can be asynchronous.
        """
        self.size = default_workers() if workers is None else workers
        self.sources = dict(sources)
        self._pinned = pinned
        self._workers = [_Worker() for _ in range(self.size)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        # One thread per process waits for its pixels; the system call writes them directly into the batch.
        self._threads = ThreadPoolExecutor(max(1, self.size), thread_name_prefix="images")
        atexit.register(self.close)  # multiprocessing ends its children with SIGTERM, which these ignore
        if self._workers:
            message = ForkingPickler.dumps(self.sources)
            for worker in self._workers:
                self._threads.submit(self._begin, worker, message)

    def start(self, source: str, rows: Sequence[Row]) -> PendingBatch:
        """Start decoding these rows, after all earlier requests."""
        shape = self.sources[source].shape(len(rows))
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        into = pixels.numpy()
        starts = range(0, len(rows), _PIECE)
        return PendingBatch(
            pixels, [self._submit(source, rows[at : at + _PIECE], into[at : at + _PIECE]) for at in starts]
        )

    def parts_ahead(self, rows: int) -> int:
        """Return the number of parts of `rows` rows to keep in flight, so that no worker is idle."""
        return 1 + -(-2 * self.size * _PIECE // rows) if self.size else 0

    def close(self) -> None:
        """End the processes; unfinished parts are lost."""
        atexit.unregister(self.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _begin(self, worker: _Worker, message: memoryview) -> None:
        try:
            worker.send_sources(message)
        finally:
            self._idle.put(worker)  # also a killed worker: its next request raises the error

    def _submit(self, source: str, rows: Sequence[Row], into: NDArray[np.uint8]) -> Future[DecodedRows]:
        if self.size:
            return self._threads.submit(self._ask, source, rows, into)
        done: Future[DecodedRows] = Future()
        try:
            done.set_result(make_rows(self.sources[source], rows, into))
        except AsgoError as error:
            done.set_exception(error)
        return done

    def _ask(self, source: str, rows: Sequence[Row], into: NDArray[np.uint8]) -> DecodedRows:
        worker = self._idle.get()
        try:
            return worker.ask(source, rows, into)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process, with a pipe for messages and a socket for pixels, which are received directly into the batch."""

    def __init__(self) -> None:
        self._pixels, child_pixels = socket.socketpair()
        self._process, self._messages = start_child(_work, child_pixels, hold_back=[signal.SIGTERM])
        child_pixels.close()

    def send_sources(self, message: memoryview) -> None:
        """Send the sources. With a million images they exceed the pipe's buffer: waits until torch is imported."""
        self._messages.send_bytes(message)

    def ask(self, source: str, rows: Sequence[Row], into: NDArray[np.uint8]) -> DecodedRows:
        try:
            self._messages.send((source, rows))
            answer: DecodedRows | Exception = self._messages.recv()
            if isinstance(answer, DecodedRows):
                _receive(self._pixels, into)
        except (EOFError, OSError):
            raise AsgoError(
                "a process that decodes images was killed; if the system ran out of memory, use fewer --workers"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self._messages.close()
        self._pixels.close()


def _receive(pixels: socket.socket, into: NDArray[np.uint8]) -> None:
    rest = into.data.cast("B")
    while rest:
        count = pixels.recv_into(rest, flags=socket.MSG_WAITALL)  # one system call, which releases the GIL
        if not count:
            raise EOFError
        rest = rest[count:]


def _work(messages: Connection[Any, Any], pixels: socket.socket) -> None:
    """Main function of a process: decode the requested rows until the pipe is closed."""
    begin_child()
    # Batch systems send SIGTERM to all processes. Ignore it, so that the training loop can finish its step and save a
    # checkpoint. `start_child` has blocked it until here.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow warns of unusual but readable files
    sources: Mapping[str, ImageSource] = messages.recv()
    while True:
        try:
            name, rows = messages.recv()
        except EOFError:
            return
        into = np.empty(sources[name].shape(len(rows)), dtype=np.uint8)
        try:
            messages.send(make_rows(sources[name], rows, into))
        except AsgoError as error:
            messages.send(error)
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickling drops the traceback
            messages.send(error)
        else:
            pixels.sendall(into.data)


def make_rows(source: ImageSource, rows: Sequence[Row], into: NDArray[np.uint8]) -> DecodedRows:
    """Decode the images of `rows` into `into` (rows, size, size, channels). Raises `AsgoError` with an image's name."""
    decoded = DecodedRows()
    for (epoch, index), pixels in zip(rows, into, strict=True):
        decoded.used.append(_make_row(source, epoch, index, pixels, decoded.bad))
    return decoded


def _make_row(source: ImageSource, epoch: int, index: int, into: NDArray[np.uint8], bad: dict[str, str]) -> int:
    """Decode one row; return the index of the image used: `index`, a replacement, or -1."""
    for other in range(index, index + _BAD_IN_A_ROW):
        used = other % len(source.images)
        name = source.images.name(used)
        try:
            into[:] = source.pixels(used, epoch, index)
            return used
        except BadImageError as error:
            if source.on_bad == "stop":
                raise
            bad[name] = str(error)
            if source.on_bad == "leave out":
                return -1
    raise AsgoError(f"{_BAD_IN_A_ROW} images in a row cannot be decoded, the last one {name}; the data may be damaged")
