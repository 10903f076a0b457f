"""The folder of a run: its configuration, its metrics and its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import write_atomically
from pipelines.training.metrics import Row, read_lines, to_line, to_lines

_LOCK = ".lock"
_RECORDED_PACKAGES = ("asgo", "torch", "numpy", "safetensors", "tiktoken")


@dataclass(frozen=True)
class Divergence:
    """Why a run cannot go on: a loss or gradient that was not finite."""

    step: int
    reason: str


class RunFolder:
    """Paths and writing; what is inside is described in the README."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._divergence_path = path / "diverged.json"
        self._metrics: IO[str] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def config_path(self) -> Path:
        """The resolved configuration; a folder without it is no run."""
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        """The records, a JSON object a line."""
        return self.path / "metrics.jsonl"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.is_file()

    def config(self) -> RunConfig:
        """The configuration that the run was begun with."""
        try:
            return load_run_config(json.loads(self.config_path.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, ValidationError):
            raise AsgoError(f"{self.config_path}: not a configuration that this version of asgo can read") from None

    def rows(self) -> list[Row]:
        """The records so far."""
        return read_lines(self.metrics_path) if self.metrics_path.is_file() else []

    def divergence(self) -> Divergence | None:
        """How the run diverged; None unless its last attempt did."""
        try:
            return Divergence(**json.loads(self._divergence_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def record_divergence(self, divergence: Divergence) -> None:
        """Leave word that the run diverged, until somebody continues it; if the disk is full, go without."""
        with contextlib.suppress(OSError):
            write_atomically(self._divergence_path, (json.dumps(asdict(divergence), indent=1) + "\n").encode())

    def lock(self) -> None:
        """Keep other processes from training here until `close`; makes the folder.

        Raises `UsageError` if another one does already. Disks that know no locks do without.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("ab")
        if not _try_lock(self._lock):
            raise UsageError(f"{self.path}: another process trains here; wait for it, or choose another --out")

    def is_locked(self) -> bool:
        """Whether a process trains here now."""
        try:
            with (self.path / _LOCK).open("r+b") as file:
                return not _try_lock(file)
        except FileNotFoundError:
            return False

    def begin(self, config: RunConfig, description: dict[str, Any], device: str) -> None:
        """Make the folder, and record what the run is."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        record = {"config": config.model_dump(mode="json"), "data": description, "environment": environment(device)}
        write_atomically(self.config_path, (json.dumps(record, indent=1) + "\n").encode())

    def continue_from(self, rows: list[Row]) -> None:
        """Make the metrics file hold exactly `rows`, and open it for more."""
        self._divergence_path.unlink(missing_ok=True)
        write_atomically(self.metrics_path, to_lines(rows))
        self._metrics = self.metrics_path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a record, in one write that readers see at once."""
        assert self._metrics is not None
        self._metrics.write(to_line(row))
        self._metrics.flush()

    def close(self) -> None:
        """Close the metrics file, and let other processes in."""
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock the open file; False if another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def refuse_existing(folder: RunFolder) -> None:
    """`UsageError` if a new run cannot begin in the folder."""
    if folder.exists():
        raise UsageError(f"{folder.path}: holds a run already; continue it with --resume, or choose another --out")
    # A run killed before its first record leaves an empty `checkpoints`, or a configuration half-written.
    leftovers = {"checkpoints", ".config.json.partial", _LOCK}
    if folder.path.is_dir() and {path.name for path in folder.path.iterdir()} <= leftovers:
        return
    if folder.path.exists():
        raise UsageError(f"{folder.path}: exists and is not a run; choose another --out")


def environment(device: str) -> dict[str, Any]:
    """Versions, code and machine, for the record."""
    return {
        "device": device,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _RECORDED_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this source code, if it runs from a checkout; marked where files were changed since."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
