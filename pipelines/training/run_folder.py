"""The folder of a run: its configuration, its metrics and its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import AsgoError, UsageError
from pipelines.locking import try_lock
from pipelines.storage import make_folder, naming, parse_json, refusing_links, sync, write_atomically
from pipelines.training.metrics import Row, read_lines, to_line, to_lines
from pipelines.training.statistics_file import STATISTICS

_CHECKPOINT = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,18})")
_RECORDED_PACKAGES = ("asgo", "torch", "numpy", "safetensors", "tiktoken")

TRIALS = "trials"
"""The folder of a search's trials, in the folder of the search."""
SEARCH_RECORD = "search.json"
"""What they are trials of, beside them."""


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
        self.statistics_path = path / STATISTICS
        self._divergence_path = path / "diverged.json"
        self._earlier_path = path / "metrics.old.jsonl"
        self._lock_path = path / ".lock"
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
            with naming(self.config_path):
                return load_run_config(parse_json(self.config_path.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, ValidationError):
            raise AsgoError(f"{self.config_path}: not a configuration that this version of asgo can read") from None

    def rows(self) -> list[Row]:
        """The records so far."""
        return read_lines(self.metrics_path) if self.metrics_path.is_file() else []

    def divergence(self) -> Divergence | None:
        """How the run diverged; None unless its last attempt did."""
        try:
            return Divergence(**parse_json(self._divergence_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def record_divergence(self, divergence: Divergence) -> None:
        """Record that the run diverged, until it is resumed (best effort)."""
        with contextlib.suppress(OSError, AsgoError):
            self.require_ours()
            write_atomically(self._divergence_path, (json.dumps(asdict(divergence), indent=1) + "\n").encode())

    def lock(self) -> None:
        """Keep other processes from training here until `close`; makes the folder.

        Raises `UsageError` if another one does already. Disks that know no locks do without.
        """
        make_folder(self.path)
        self._lock = os.fdopen(refusing_links(str(self._lock_path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", 0)
        if not try_lock(self._lock):
            raise UsageError(f"{self.path}: another process trains here; wait for it, or choose another --out")
        self.require_ours()

    def is_locked(self) -> bool:
        """Whether a process trains here now."""
        try:
            with self._lock_path.open("r+b") as file:
                return not try_lock(file)
        except FileNotFoundError:
            return False

    def require_ours(self) -> None:
        """Raise `AsgoError` if the folder was deleted, moved or begun anew since `lock`.

        To be called before every write: another run may train under the same path now.
        """
        assert self._lock is not None
        try:
            ours = os.path.samestat(self._lock_path.stat(), os.fstat(self._lock.fileno()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            ours = False
        if not ours or (self._metrics is not None and not self.config_path.exists()):
            raise AsgoError(
                f"{self.path}: deleted, moved or begun anew while this run trained in it, which stops; train again in "
                "another --out, or go on with --resume where it was moved to"
            )

    def settle(self) -> None:
        """Flush to disk what no checkpoint holds, before one is published; raises as `require_ours`."""
        self.require_ours()
        if self.statistics_path.exists():
            sync(self.statistics_path)
            sync(self.path)

    def mark_saved(self) -> None:
        """Remember that the run has had a checkpoint, in the lock file (best effort)."""
        assert self._lock is not None
        with contextlib.suppress(OSError):
            if not self.was_saved():
                self._lock.write(b"saved\n")

    def was_saved(self) -> bool:
        """Whether the run has had a checkpoint, which may have been removed since."""
        return _size(self._lock_path) > 0

    def lost_checkpoints(self) -> bool:
        """Whether the run has had checkpoints and has none now, as where somebody freed the disk."""
        return self.was_saved() and not checkpoint_folders(self.checkpoints)

    def ends_at(self, step: int) -> bool:
        """Whether the metrics end with the validation after `step`."""
        rows = self.rows()
        return bool(rows) and (rows[-1]["split"], rows[-1]["step"]) == ("val", step)

    def begin(self, config: RunConfig, description: dict[str, Any], device: str) -> None:
        """Make the folder, and record what the run is."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        record = {"config": config.model_dump(mode="json"), "data": description, "environment": environment(device)}
        write_atomically(self.config_path, (json.dumps(record, indent=1) + "\n").encode())

    def continue_from(self, rows: list[Row]) -> None:
        """Make the metrics file hold exactly `rows`, and open it for more.

        A record that would be emptied is put aside, until `finish`: the run begins again, and may never get as far.
        """
        self._divergence_path.unlink(missing_ok=True)
        if not rows and _size(self.metrics_path) > _size(self._earlier_path):
            self.metrics_path.replace(self._earlier_path)
        write_atomically(self.metrics_path, to_lines(rows))
        self._metrics = self.metrics_path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a record, in one write that readers see at once; raises as `require_ours`."""
        assert self._metrics is not None
        self.require_ours()
        with naming(self.metrics_path):
            self._metrics.write(to_line(row))
            self._metrics.flush()

    def finish(self) -> None:
        """Remove the record that was put aside, now that this one holds as much."""
        self.require_ours()
        self._earlier_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the metrics file, and let other processes in."""
        for file in (self._metrics, self._lock):
            if file is not None:
                # What `append` could not flush fails a second time here, and would hide the first error.
                with contextlib.suppress(OSError):
                    file.close()


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def refuse_existing(folder: RunFolder) -> None:
    """`UsageError` if a new run cannot begin in the folder."""
    if folder.exists():
        raise UsageError(f"{folder.path}: holds a run already; continue it with --resume, or choose another --out")
    if folder.path.exists() and not folder.path.is_dir():
        raise UsageError(f"{folder.path}: not a folder; choose another --out")
    in_the_way = _in_the_way(folder)
    if in_the_way is not None:
        raise UsageError(f"{folder.path}: no place for a new run: {in_the_way} is in the way; choose another --out")


def _in_the_way(folder: RunFolder) -> Path | None:
    """What a new run would overwrite or be taken for a part of: records and checkpoints, shards, other runs.

    Files of other kinds are not: a log, notes, what a run leaves that was killed before its first record.
    """
    names = ("metrics.jsonl", STATISTICS, "diverged.json", "tensorboard", "wandb", "manifest.json")
    ours = [path for path in map(folder.path.joinpath, names) if path.exists()]
    inner_runs = folder.path.glob("*/config.json")
    return next(iter([*ours, *checkpoint_folders(folder.checkpoints), *sorted(inner_runs)]), None)


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a folder with such a name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_folders(parent: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whether they verify or not.

    Copies that a user made, such as `step-00000200-best`, are not among them. Raises `OSError` if `parent` cannot be
    read: a run whose checkpoints are not seen would begin anew.
    """
    try:
        found = [path for path in parent.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(filter(Path.is_dir, found), key=step_of)


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
