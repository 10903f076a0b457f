"""The processes that read, decode and resize images."""

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
from pipelines.data.images.decode import BadImageError, EncodedImage
from pipelines.data.images.image_sets import ImageSet
from pipelines.data.images.transforms import Transform, render
from pipelines.errors import AsgoError

OnBad = Literal["stop", "replace", "leave out"]
Row = tuple[int, int]
"""The epoch, which random transforms depend on, and the index of an image."""

_PIECE = 16  # images that a worker is given at a time
_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class ImageSource:
    """Images and how they are seen.

    What cannot be decoded stops the run, or is replaced by the next image of the set that can be, or left out.
    """

    images: ImageSet
    transform: Transform
    seed: int = 0
    on_bad: OnBad = "stop"
    exact: bool = False
    """Whether pixels are bit for bit torchvision's; see `render`."""


@dataclass
class DecodedRows:
    """What became of some rows: `used` (rows,) are the images they show, -1 for none; `bad`, by name, why not."""

    used: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PendingBatch:
    """A part of a batch that is being made: uint8 (rows, size, size, 3), and what becomes of its pieces."""

    pixels: Tensor
    pieces: Sequence[Future[DecodedRows]]

    def wait(self) -> DecodedRows:
        """Wait until all is there. Raises what the making raised."""
        made = DecodedRows()
        for piece in self.pieces:
            made.used += piece.result().used
            made.bad |= piece.result().bad
        return made

    def cancel(self) -> None:
        """Have no more of it made."""
        for piece in self.pieces:
            piece.cancel()


def default_workers() -> int:
    """A process for each processor that this one may use; the processes of a training run on a machine share them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class ImageWorkers:
    """Processes that make parts of batches, from named sources; a context manager that ends them.

    They are processes and not threads, though the decoders run beside other threads: a training loop that hands many
    small operations to a GPU goes half as fast when but one thread decodes images beside it.
    """

    def __init__(self, sources: Mapping[str, ImageSource], workers: int | None = None, *, pinned: bool = False) -> None:
        """Start `workers` processes, in the background; none with 0, when all is done at once, by this one.

        With `pinned`, batches are in memory that a CUDA device can fetch them from while the program goes on.
        """
        self.size = default_workers() if workers is None else workers
        self.sources = dict(sources)
        self._pinned = pinned
        self._workers = [_Worker() for _ in range(self.size)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        # A thread for each process, which waits for its pixels; the operating system puts them where they belong.
        self._threads = ThreadPoolExecutor(max(1, self.size), thread_name_prefix="images")
        atexit.register(self.close)  # the usual end of forgotten processes is SIGTERM, which these ignore
        if self._workers:
            message = ForkingPickler.dumps(self.sources)
            for worker in self._workers:
                self._threads.submit(self._begin, worker, message)

    def start(self, source: str, rows: Sequence[Row]) -> PendingBatch:
        """Have the images of some rows made, after what was asked for before."""
        size = self.sources[source].transform.size
        pixels = torch.empty((len(rows), size, size, 3), dtype=torch.uint8, pin_memory=self._pinned)
        into = pixels.numpy()
        starts = range(0, len(rows), _PIECE)
        return PendingBatch(
            pixels, [self._submit(source, rows[at : at + _PIECE], into[at : at + _PIECE]) for at in starts]
        )

    def parts_ahead(self, rows: int) -> int:
        """How many parts of so many rows are to be under way so that no process waits."""
        return 1 + -(-2 * self.size * _PIECE // rows) if self.size else 0

    def close(self) -> None:
        """End the processes; what is being made is lost."""
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
            worker.tell(message)
        finally:
            self._idle.put(worker)  # one that is gone says so to whoever asks

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
    """A process and the ways to it: messages, and pixels, which go from the socket right into the batch."""

    def __init__(self) -> None:
        self._pixels, its_pixels = socket.socketpair()
        self._process, self._messages = start_child(_work, its_pixels, hold_back=[signal.SIGTERM])
        its_pixels.close()

    def tell(self, message: memoryview) -> None:
        """Send it its sources. With a million images that is much, and takes until it has imported torch."""
        self._messages.send_bytes(message)

    def ask(self, source: str, rows: Sequence[Row], into: NDArray[np.uint8]) -> DecodedRows:
        try:
            self._messages.send((source, rows))
            answer: DecodedRows | Exception = self._messages.recv()
            if isinstance(answer, DecodedRows):
                _receive(self._pixels, into)
        except (EOFError, OSError):
            raise AsgoError(
                "a process that decodes images is gone; if the system ended it for want of memory, use fewer --workers"
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
        count = pixels.recv_into(rest, flags=socket.MSG_WAITALL)  # without the interpreter's lock, all in one call
        if not count:
            raise EOFError
        rest = rest[count:]


def _work(messages: Connection[Any, Any], pixels: socket.socket) -> None:
    """What a process does until the other end is closed."""
    begin_child()
    # Batch systems send it to all processes; this one goes on, so that the training loop can finish its step and save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # held back until here
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's, of odd but readable files
    sources: Mapping[str, ImageSource] = messages.recv()
    while True:
        try:
            name, rows = messages.recv()
        except EOFError:
            return
        size = sources[name].transform.size
        into = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        try:
            messages.send(make_rows(sources[name], rows, into))
        except AsgoError as error:
            messages.send(error)
        except Exception as error:
            error.add_note(traceback.format_exc())  # which does not travel by itself
            messages.send(error)
        else:
            pixels.sendall(into.data)


def make_rows(source: ImageSource, rows: Sequence[Row], into: NDArray[np.uint8]) -> DecodedRows:
    """Put the images of `rows` into `into` (rows, size, size, 3). Raises `AsgoError` that names what stops it."""
    made = DecodedRows()
    for (epoch, index), seen in zip(rows, into, strict=True):
        made.used.append(_make_row(source, epoch, index, seen, made.bad))
    return made


def _make_row(source: ImageSource, epoch: int, index: int, into: NDArray[np.uint8], bad: dict[str, str]) -> int:
    """Returns the image that was used: `index`, one that stands in for it, or -1."""
    key = (source.seed, epoch, index)
    for other in range(index, index + _BAD_IN_A_ROW):
        used = other % len(source.images)
        name = source.images.name(used)
        try:
            image = EncodedImage(source.images.read(used), name)
            into[:] = render(image, source.transform.view(image.height, image.width, key), exact=source.exact)
            return used
        except BadImageError as error:
            if source.on_bad == "stop":
                raise
            bad[name] = str(error)
            if source.on_bad == "leave out":
                return -1
    raise AsgoError(f"{_BAD_IN_A_ROW} images in a row cannot be decoded, the last of them {name}; is the data damaged?")
