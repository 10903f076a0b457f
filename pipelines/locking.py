"""Locks on open files. The system releases the lock of a process that is killed."""

from __future__ import annotations

import errno
import fcntl
from typing import IO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of `flock` on a disk without locks, as on some clusters."""


def try_lock(file: IO[bytes] | int) -> bool:
    """Lock an open file; False if another process holds the lock. A disk without locks counts as locked."""
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[bytes] | int) -> bool:
    """Wait for the lock of an open file; False on a disk without locks."""
    return _flock(file, fcntl.LOCK_EX)


def _flock(file: IO[bytes] | int, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
