"""The folder of a run: its configuration, its metrics and its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import AsgoError, UsageError
from pipelines.imported_optimizers import OptimizerSource
from pipelines.locking import try_lock
from pipelines.storage import make_folder, naming, parse_json, refusing_links, sync, write_atomically
from pipelines.training.lineage import Ancestor
from pipelines.training.metrics import Row, read_lines, to_line, to_lines
from pipelines.training.shadow_file import SHADOWS, ShadowFile, shadow_file
from pipelines.training.statistics_file import STATISTICS, StatisticsFile, statistics_file

_CHECKPOINT = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,18})")
_RECORDED_PACKAGES = ("asgo", "torch", "numpy", "safetensors", "tiktoken")

TRIALS = "trials"
"""Folder of a search's trials, in the folder of the search."""
SEARCH_RECORD = "search.json"
"""Description of the search, in the folder of its trials."""
SUPERSEDED = "superseded"
"""Final runs of former best settings, in the folder of the trials."""


@dataclass(frozen=True)
class Divergence:
    """Why a run diverged: a loss or gradient that is not finite."""

    step: int
    reason: str


class RunFolder:
    """Paths, metrics file and lock of a run folder; docs/training.md describes the files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.statistics: StatisticsFile = statistics_file(path)
        self.shadows: ShadowFile = shadow_file(path)
        self._divergence_path = path / "diverged.json"
        self._earlier_path = path / "metrics.old.jsonl"
        self._lock_path = path / ".lock"
        self._metrics: IO[str] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def config_path(self) -> Path:
        """The resolved configuration. A folder without it holds no run."""
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        """The metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def source_folder(self) -> Path:
        """Holds a copy of the file that defines an imported optimizer. It is never executed."""
        return self.path / "optimizer"

    def optimizer_source(self) -> dict[str, Any]:
        """Return the record of an imported optimizer's code; empty for other optimizers."""
        with naming(self.config_path):
            content = parse_json(self.config_path.read_text(encoding="utf-8"))
        return content.get("optimizer_source") or {}

    def require_source(self, source: OptimizerSource) -> None:
        """Raise `UsageError` unless an imported optimizer has the code with which the run began."""
        began = self.optimizer_source()
        if began.get("sha256") != source.sha256:
            package = f" ({began['package']})" if began.get("package") else ""
            raise UsageError(
                f"{self.path}: began with other code of its optimizer{package} than {source.file} has now; restore it "
                f"(a copy is in {self.source_folder}), or train in another --out"
            )

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.is_file()

    def config(self) -> RunConfig:
        """Return the configuration with which the run began. Raises `AsgoError` if it cannot be read."""
        try:
            with naming(self.config_path):
                return load_run_config(parse_json(self.config_path.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, ValidationError):
            raise AsgoError(f"{self.config_path}: not a configuration that this version of asgo can read") from None

    def lineage(self) -> list[Ancestor]:
        """Return the checkpoints that the run descends from, oldest first; none unless it is a branch.

        Raises `AsgoError` if the record cannot be read.
        """
        try:
            with naming(self.config_path):
                record = parse_json(self.config_path.read_text(encoding="utf-8"))
            return [Ancestor.model_validate(ancestor) for ancestor in record.get("lineage", [])]
        except (ValueError, TypeError, AttributeError):  # pydantic's `ValidationError` is a `ValueError`
            raise AsgoError(f"{self.config_path}: its lineage is not one that asgo wrote") from None

    def rows(self) -> list[Row]:
        """Return the metrics so far."""
        return read_lines(self.metrics_path) if self.metrics_path.is_file() else []

    def divergence(self) -> Divergence | None:
        """Return how the run diverged; None unless its last attempt did."""
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
        """Make the folder and lock it until `close`.

        Raises `UsageError` if another process has the lock. On a disk without locks, does not lock.
        """
        make_folder(self.path)
        self._lock = os.fdopen(refusing_links(str(self._lock_path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", 0)
        if not try_lock(self._lock):
            raise UsageError(f"{self.path}: another process trains here; wait for it, or choose another --out")
        self.require_ours()

    def require_ours(self) -> None:
        """Raise `AsgoError` if the folder was deleted, moved or replaced since `lock`.

        Call it before every write: another run may train under the same path now.
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
                f"{self.path}: deleted, moved or replaced while this run trained in it; the run stops; train again in "
                "another --out, or, if it was moved, continue there with --resume"
            )

    def settle(self) -> None:
        """Flush the files of measurements to disk before a checkpoint is published; raises like `require_ours`."""
        self.require_ours()
        for path in (self.statistics.path, self.shadows.path):
            if path.exists():
                sync(path)
                sync(self.path)

    def mark_saved(self) -> None:
        """Record in the lock file that the run has had a checkpoint (best effort)."""
        assert self._lock is not None
        with contextlib.suppress(OSError):
            if not self.was_saved():
                self._lock.write(b"saved\n")

    def was_saved(self) -> bool:
        """Whether the run ever had a checkpoint."""
        return _size(self._lock_path) > 0

    def lost_checkpoints(self) -> bool:
        """Whether the run had checkpoints and has none now, for example because a user deleted them."""
        return self.was_saved() and not checkpoint_folders(self.checkpoints)

    def ends_at(self, step: int) -> bool:
        """Whether the metrics end with the validation after `step`."""
        rows = self.rows()
        return bool(rows) and (rows[-1]["split"], rows[-1]["step"]) == ("val", step)

    def begin(
        self,
        config: RunConfig,
        description: dict[str, Any],
        device: str,
        lineage: Sequence[Ancestor] = (),
        source: OptimizerSource | None = None,
    ) -> None:
        """Make the folder, and write configuration, data description and environment.

        Also the lineage of a branch, and the code of an imported optimizer.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"config": config.model_dump(mode="json"), "data": description}
        record["environment"] = environment(device)
        if lineage:
            record["lineage"] = [ancestor.model_dump() for ancestor in lineage]
        if source is not None:
            record["optimizer_source"] = source.record()
            self.source_folder.mkdir(exist_ok=True)
            write_atomically(self.source_folder / source.file.name, source.content)
        write_atomically(self.config_path, (json.dumps(record, indent=1) + "\n").encode())

    def continue_from(self, rows: list[Row]) -> None:
        """Rewrite the metrics file with `rows`, and open it for appending.

        If `rows` is empty, keeps the old file under another name until `finish`: the run starts again, and may not get
        as far.
        """
        self._divergence_path.unlink(missing_ok=True)
        if not rows and _size(self.metrics_path) > _size(self._earlier_path):
            self.metrics_path.replace(self._earlier_path)
        write_atomically(self.metrics_path, to_lines(rows))
        self._metrics = self.metrics_path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Append a row and flush it, in one write; raises like `require_ours`."""
        assert self._metrics is not None
        self.require_ours()
        with naming(self.metrics_path):
            self._metrics.write(to_line(row))
            self._metrics.flush()

    def finish(self) -> None:
        """Remove the old metrics file that `continue_from` kept: the new one is complete."""
        self.require_ours()
        self._earlier_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the metrics file and release the lock."""
        for file in (self._metrics, self._lock):
            if file is not None:
                # If `append` could not flush, closing fails too, and would hide the first error.
                with contextlib.suppress(OSError):
                    file.close()


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def refuse_existing(folder: RunFolder) -> None:
    """Raise `UsageError` if a new run cannot begin in the folder."""
    if folder.exists():
        raise UsageError(f"{folder.path}: already holds a run; continue it with --resume, or choose another --out")
    if folder.path.exists() and not folder.path.is_dir():
        raise UsageError(f"{folder.path}: not a folder; choose another --out")
    in_the_way = _in_the_way(folder)
    if in_the_way is not None:
        raise UsageError(f"{folder.path}: cannot begin a new run here: {in_the_way} exists; choose another --out")


def _in_the_way(folder: RunFolder) -> Path | None:
    """Return a path that prevents a new run: metrics, checkpoints, data shards, or other runs; None if there is none.

    Other files do not: a log, notes, or what a run leaves that was killed before its first row.
    """
    names = ("metrics.jsonl", STATISTICS, SHADOWS, "diverged.json", "tensorboard", "wandb", "manifest.json")
    ours = [path for path in map(folder.path.joinpath, names) if path.exists()]
    inner_runs = folder.path.glob("*/config.json")
    return next(iter([*ours, *checkpoint_folders(folder.checkpoints), *sorted(inner_runs)]), None)


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_folders(parent: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, valid or not.

    Ignores copies that a user made, such as `step-00000200-best`. Raises `OSError` if `parent` cannot be read: without
    its checkpoints, the run would start again.
    """
    try:
        found = [path for path in parent.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(filter(Path.is_dir, found), key=step_of)


def environment(device: str) -> dict[str, Any]:
    """Return package versions, git commit, device, instruction set of the CPU, and platform."""
    import torch  # slow to import, and commands that only read run folders do not need it

    return {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
    """Return the commit of a source checkout, with `-dirty` if files were changed; None if there is no checkout."""
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
