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

_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use_private_compiler_cache() -> None:
    """Have compiled code kept in the user's own cache folder, for this process and its children; before compiling.

    Torch's own choice is a folder in the shared temporary one, of a name that anybody can guess. It executes and
    unpickles what it finds there, also what another account has put there.

    Raises:
        UsageError: a folder that the environment names belongs to another account, or everybody can write there.
    """
    for name in _VARIABLES:
        if os.environ.get(name):
            _require_private(name, Path(os.environ[name]))
    if not all(os.environ.get(name) for name in _VARIABLES):
        folder = _own_folder()
        for name, part in zip(_VARIABLES, ("inductor", "triton"), strict=True):
            os.environ[name] = os.environ.get(name) or str(folder / part)
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # they would be in the shared folder all the same


def _own_folder() -> Path:
    """A folder that lasts, or else one for this process alone, as without a home or on a read-only one."""
    with contextlib.suppress(OSError, RuntimeError):  # of a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asgo" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="asgo-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _require_private(name: str, folder: Path) -> None:
    if folder.exists() and not _is_private(folder):
        raise UsageError(
            f"{name}={folder}: belongs to another account, or everybody can write there, and code from there would be "
            f"run as you; name a folder of your own, or unset {name}"
        )


def _is_private(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & stat.S_IWOTH
