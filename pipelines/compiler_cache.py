"""The cache folder of torch.compile."""

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
    """Keep compiled code in a private folder, for this process and its children. Call it before compiling.

    Torch keeps compiled code in the temporary folder, under a predictable name, and executes and unpickles what it
    finds there. Where other accounts can write, they could run code as the user. No variable of torch moves all of it,
    so this function replaces the temporary folder itself.

    Raises:
        UsageError: a cache folder in the environment belongs to another account, or is world-writable.
    """
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = Path(os.environ.get(name, ""))
        if name in os.environ and folder.exists() and not _is_private(folder):
            raise UsageError(
                f"{name}={folder}: belongs to another account, or is writable by all, and torch executes its content; "
                f"name a folder of your own, or unset {name}"
            )
    if not _is_private(Path(tempfile.gettempdir())):
        tempfile.tempdir = os.environ["TMPDIR"] = str(_own_folder())
    separate_instruction_sets()


def separate_instruction_sets() -> None:
    """Give each instruction set of the CPU a cache folder of its own.

    Trap: the keys of torch's cache do not contain the instruction set. A loop that was generated for AVX-512 takes
    steps of 16 elements. Compiled for AVX2, as by another node that shares the folder, it computes half of them.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / "torchinductor")
    if cache.name != capability:  # a parent process may have added it
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / capability)


def _own_folder() -> Path:
    """Return a permanent private folder; a temporary one if there is no home folder or it is read-only."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
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
