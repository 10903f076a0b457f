"""Where `asgo data text` writes: to a staging folder that replaces the output folder at the end, or in place."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.holding import clear, foreign_names, held_folder, held_name
from pipelines.data.manifest import MANIFEST, UNFINISHED, load_manifest
from pipelines.errors import UsageError
from pipelines.storage import staged_folder, write_atomically

_MARK = b'{"command": "data text"}\n'
"""The content of `unfinished.json` in a folder that is written in place. Such work restarts; it is not resumed."""


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` unless a data folder may be created at `out`.

    `out` may be missing, an empty folder, or left by this command when it was killed. With `overwrite` it may also be
    a folder that holds token shards and nothing else, so other files are never deleted.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file is in the way; choose another --out")
    names = sorted(path.name for path in out.iterdir())
    if not names or _is_left_over(out):
        return
    if not overwrite:
        raise UsageError(f"{out}: this folder is not empty; choose another --out, or pass --overwrite")
    if MANIFEST not in names:
        raise UsageError(f"{out}: not a folder of token shards (no {MANIFEST}), so it is not overwritten")
    expected = {MANIFEST, UNFINISHED, *(shard.file for shard in load_manifest(out).shards)}
    others = [name for name in names if name not in expected]
    if others:
        raise UsageError(f"{out}: it also holds {others[0]}, so it is not overwritten; move that file away first")
    _require_exchangeable(out)


@contextlib.contextmanager
def held_destination(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Lock `out` against other processes. Raises as `check_destination` does, and if another process holds the lock."""
    target = out.resolve()  # replace the target of a symbolic link, not the link
    with held_folder(target) if _is_written_in_place(target) else held_name(target):
        check_destination(out, overwrite=overwrite)
        yield


@contextlib.contextmanager
def staged_data(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to write to. It becomes `out` at the end; on an error it is removed.

    Raises as `check_destination` does if `out` is occupied at the end.
    """
    target = out.resolve()
    if _is_written_in_place(target):
        with _marked_unfinished(target):
            yield target
        return
    try:
        with staged_folder(target, replace=overwrite) as folder:
            yield folder
            check_destination(out, overwrite=overwrite)
    except OSError as error:
        if error.errno == errno.EBUSY and overwrite:
            raise _not_exchangeable(out, "it is a mount point") from None
        raise


def _is_written_in_place(target: Path) -> bool:
    """Whether to write in place. An existing empty folder may be a mount point, or its parent not writable."""
    return target.is_dir() and (_is_left_over(target) or not any(target.iterdir()))


def _is_left_over(folder: Path) -> bool:
    """Whether a folder holds only the files of a killed process."""
    mark = folder / UNFINISHED
    is_marked = mark.is_file() and not (folder / MANIFEST).exists() and mark.read_bytes() == _MARK
    return is_marked and not foreign_names(folder)


@contextlib.contextmanager
def _marked_unfinished(folder: Path) -> Iterator[None]:
    clear(folder)
    try:
        write_atomically(folder / UNFINISHED, _MARK)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            clear(folder)
        raise
    (folder / UNFINISHED).unlink()


def _require_exchangeable(out: Path) -> None:
    target = out.resolve()
    if target.is_mount():
        raise _not_exchangeable(out, "it is a mount point")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _not_exchangeable(out, f"{target.parent} cannot be written to")


def _not_exchangeable(out: Path, why: str) -> UsageError:
    return UsageError(
        f"{out}: it cannot be replaced as a whole, because {why}; empty it first, or choose a folder inside it"
    )
