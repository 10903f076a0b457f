"""Where torch.compile keeps what it has compiled."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from pipelines.errors import UsageError


def use_private_compiler_cache() -> None:
    """Have compiled code kept in the user's own cache folder, by this process and its children; before compiling.

    Torch keeps it in the temporary folder, under a name that anybody can guess, and executes and unpickles what it
    finds there. Where others can write, that may be another account's: the temporary folder becomes one of the user's
    own. No variable of torch's moves all of it.

    Raises:
        UsageError: a cache that the environment names belongs to another account, or everybody can write there.
    """
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = Path(os.environ.get(name, ""))
        if name in os.environ and folder.exists() and not _is_private(folder):
            raise UsageError(
                f"{name}={folder}: belongs to another account, or everybody can write there, and what is there would "
                f"be run as you; name a folder of your own, or unset {name}"
            )
    if not _is_private(Path(tempfile.gettempdir())):
        tempfile.tempdir = os.environ["TMPDIR"] = str(_own_folder())


def _own_folder() -> Path:
    """A folder that lasts, or else one for this process alone, as without a home or on a read-only one."""
    with contextlib.suppress(OSError, RuntimeError):  # of a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asgo" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder.resolve()
    folder = Path(tempfile.mkdtemp(prefix="asgo-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_private(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & stat.S_IWOTH
