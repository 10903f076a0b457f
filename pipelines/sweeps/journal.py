"""A study's journal file: locked so that a kill frees it, and repaired where a write was torn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from pipelines.errors import UsageError
from pipelines.locking import wait_for_lock
from pipelines.storage import naming


def open_journal(path: Path) -> JournalStorage:
    """Open the journal, or begin it. Raises `UsageError` if the file is not the journal of a study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(_Journal(path.resolve()))
    except OSError:
        raise
    except Exception:  # what optuna raises for a record that it did not write depends on the record
        raise UsageError(f"{path}: not the journal of a search, or damaged; choose another --out") from None


class _Journal(JournalFileBackend):
    """optuna's journal file, with the file's name in the errors of the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Lock(path))
        self._path = path

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with naming(self._path):
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with naming(self._path):
            super().append_logs(logs)


class _Lock(JournalFileOpenLock):
    """Held by one writer at a time; the system frees it when the writer is killed.

    optuna's own locks are files. One that a kill left behind is waited for: half a minute, or for ever where it is a
    link to a relative path. Only disks without `flock` do with such a file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        with contextlib.ExitStack() as held:
            file = held.enter_context(self._path.open("r+b"))
            if not wait_for_lock(file):
                super().acquire()
                held.callback(super().release)
            _cut_torn_line(file)
            self._held = held.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut the file back to its last newline: a full disk or a kill tore what is behind it."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
