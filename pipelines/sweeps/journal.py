"""The journal file of a study: its lock does not survive a kill, and incomplete lines are removed."""

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
    """Open or create the journal. Raises `UsageError` if the file is not the journal of a study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(_Journal(path.resolve()))
    except OSError:
        raise
    except Exception:  # for an invalid record, the type depends on the record
        raise UsageError(f"{path}: not the journal of a search, or damaged; choose another --out") from None


class _Journal(JournalFileBackend):
    """optuna's journal file; an `OSError` has its path."""

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
    """A `flock`, which the system releases when the writer is killed.

    optuna's own locks are files, which stay after a kill. optuna then waits half a minute, or for ever if the lock is a
    link to a relative path. This class uses them only on disks without `flock`.
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
    """Truncate the file after its last newline: a full disk or a kill left the last line incomplete."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
