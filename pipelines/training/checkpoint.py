"""Checkpoints: written whole or not at all, verified before they are believed, readable without a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import AsgoError
from pipelines.storage import naming, parse_json, refuse_file, sha256_of, staged_folder, undo_exchange
from pipelines.tensors import Tensors
from pipelines.training.distributed import seed_of_rank
from pipelines.training.launched import launched
from pipelines.training.metrics import Counts, Row, columns_to_rows, rows_to_columns
from pipelines.training.random_state import gather_random_states, set_random_state
from pipelines.training.run_folder import RunFolder, checkpoint_folders, checkpoint_name, step_of
from pipelines.training.state import TrainState

_FORMAT = 1
_STATE = "state.json"
_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_HISTORY = "history.safetensors"
_AVERAGE = "average.safetensors"
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(partial|outgoing|pruned)")
"""What `staged_folder` and `prune` make."""


def _random_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        return int(self.state["step"])

    def config(self) -> RunConfig:
        """The configuration of the run; `AsgoError` if this version of asgo cannot read it."""
        try:
            return load_run_config(self.state["config"])
        except ValidationError:
            raise AsgoError(f"{self.folder}: its configuration is of another version of asgo") from None

    def model_tensors(self) -> Tensors:
        """The weights that were validated, by parameter name, on the CPU: averages, where the run makes them."""
        name = _AVERAGE if _AVERAGE in self.state["files"] else _MODEL
        return _load(self.folder / name)

    def rows(self) -> list[Row]:
        """The run's records up to this step."""
        return read_history(self.folder)


def read_history(folder: Path) -> list[Row]:
    """The records inside a checkpoint folder."""
    with _readable(folder / _HISTORY):
        return columns_to_rows(safetensors.numpy.load_file(folder / _HISTORY))


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, whole and in host memory, where training does not change it any more."""

    step: int
    tensors: dict[str, Tensors]
    """By file."""
    rows: list[Row]
    content: dict[str, Any]
    """Of `state.json`."""

    @property
    def bytes(self) -> int:
        """How much there is to write, about."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def take_snapshot(state: TrainState, config: RunConfig, description: dict[str, Any], counts: Counts) -> Snapshot | None:
    """Copy the run to the first process's memory, which alone gets it; an act of all processes together."""
    optimizer_tensors, scalars = state.gather_optimizer()
    tensors = {_MODEL: state.gather_model(), _OPTIMIZER: optimizer_tensors}
    if state.average is not None:
        tensors[_AVERAGE] = state.gather_average()
    for rank, random in enumerate(gather_random_states(state.clock.device, state.ranks)):
        tensors[_random_file(rank)] = random
    if not state.ranks.is_first:
        return None
    content = {
        "format": _FORMAT,
        **counts,
        "processes": state.ranks.size,
        "arithmetic": state.arithmetic,
        "config": config.model_dump(mode="json"),
        "data": description,
        "optimizer_scalars": scalars,
        "loss_scale": state.scaler.state_dict(),
    }
    return Snapshot(state.step, tensors, list(state.rows), content)


def write_snapshot(parent: Path, snapshot: Snapshot, keep: int, check: Callable[[], None] = lambda: None) -> Path:
    """Write `parent/step-<step>`, leave the newest `keep` checkpoints, and return its path.

    `check` is called before anything is written and before it is published; it raises `AsgoError` where that is not to
    be. Raises `AsgoError` if the disk refuses; then the checkpoints that were there still are.
    """
    target = parent / checkpoint_name(snapshot.step)
    try:
        check()
        # Not the parents: a run folder that was deleted must not come back.
        with staged_folder(target, replace=True, parents=False, before_rename=check) as folder:
            for name, tensors in snapshot.tensors.items():
                safetensors.torch.save_file(tensors, folder / name)
            safetensors.numpy.save_file(rows_to_columns(snapshot.rows), folder / _HISTORY)
            _write_state(folder, snapshot.content)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            check()  # of a folder that was deleted meanwhile, the disk only says that files are missing
        reason = getattr(error, "strerror", None) or error
        raise AsgoError(
            f"{target}: could not be saved: {reason}; {last_good(parent)}; make room, then --resume"
        ) from error
    prune(parent, snapshot.step, keep)
    return target


def restore(checkpoint: Checkpoint, state: TrainState) -> None:
    """Bring a fresh state to where the checkpoint was saved, bit for bit, by however many processes.

    What each process draws by itself (dropout) goes on exactly where the run has as many processes as it had.
    """
    saved, folder = checkpoint.state, checkpoint.folder
    state.load_model(_load(folder / _MODEL), str(folder))
    if state.average is not None:
        state.load_average(_load(folder / _AVERAGE), str(folder))
    state.load_optimizer(_load(folder / _OPTIMIZER), saved["optimizer_scalars"])
    state.scaler.load_state_dict(saved["loss_scale"])
    state.step = checkpoint.step
    state.rows = checkpoint.rows()
    state.clock.restart_at(saved["elapsed_s"])
    if state.ranks.rank < saved.get("processes", 1):
        set_random_state(_load(folder / _random_file(state.ranks.rank)))
    else:
        torch.manual_seed(seed_of_rank(checkpoint.config().seed, state.ranks.rank, state.step))


def _load(path: Path) -> Tensors:
    """The tensors of a file, mapped into memory. Raises `AsgoError` where another process sees it and this does not."""
    if not path.is_file():
        raise AsgoError(
            f"{path}: {launched()} does not see it; the run folder must be on a disk that all machines share"
        )
    with _readable(path):
        return safetensors.torch.load_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `AsgoError` that names the file where it cannot be read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AsgoError(f"{getattr(error, 'filename', None) or path}: cannot be read: {reason}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint, every byte of it; `AsgoError` saying what is wrong with it, or why it cannot be read."""
    with _readable(folder):
        return _verified(folder)


def _verified(folder: Path) -> Checkpoint:
    state = read_state(folder)
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise AsgoError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise AsgoError(f"{path}: truncated: {path.stat().st_size} bytes of {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise AsgoError(f"{path}: damaged: its content is not what was saved")
    return Checkpoint(folder, state)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint, verified; `AsgoError` if it is missing or altered."""
    path = folder / _STATE
    try:
        with naming(path):
            state: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        recorded = state.pop("sha256")
    except FileNotFoundError:
        raise AsgoError(f"{folder}: not a checkpoint: it has no {_STATE}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise AsgoError(f"{path}: damaged: not valid JSON with a checksum") from None
    if recorded != _digest(state):
        raise AsgoError(f"{path}: damaged: its content is not what was saved")
    if state["format"] != _FORMAT:
        raise AsgoError(f"{path}: a checkpoint of format {state['format']}; this version of asgo reads {_FORMAT}")
    return state


def last_good(parent: Path) -> str:
    """Which checkpoint a run can go back to, in words; part of other messages, so that it never fails."""
    folders = []
    with contextlib.suppress(OSError):
        folders = checkpoint_folders(parent)
    return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"


def newest_checkpoint(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(parent)):
        try:
            return open_checkpoint(folder), skipped
        except AsgoError as error:
            skipped.append(f"skipped {error}")
    return None, skipped


def _write_state(folder: Path, content: dict[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    whole = {**content, "files": files}
    with naming(folder / _STATE):
        (folder / _STATE).write_text(json.dumps({**whole, "sha256": _digest(whole)}, indent=1), encoding="utf-8")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """A checkpoint, or a run's newest good one, and a line for each newer one that is damaged.

    Raises `UsageError` for a file, and `AsgoError` if there is no good checkpoint.
    """
    refuse_file(path)
    run = RunFolder(path)
    if not run.exists():
        return open_checkpoint(path), []
    checkpoint, skipped = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        run.config()  # raises where the configuration is not of a run, as in a folder of Hugging Face
        raise AsgoError("\n".join([f"{path}: no good checkpoint in this run yet", *skipped]))
    return checkpoint, skipped


def prune(parent: Path, newest_step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to a good one; later ones are damaged, and will be replaced."""
    steps = [path for path in checkpoint_folders(parent) if step_of(path) <= newest_step]
    for path in steps[:-keep]:
        # Under a hidden name it is no checkpoint any more, however far its removal gets.
        doomed = path.with_name(f".{path.name}.pruned")
        with _saved_all_the_same(path):
            path.rename(doomed)
            _remove(doomed)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link that a user has made to one, which `rmtree` refuses."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _saved_all_the_same(path: Path) -> Iterator[None]:
    """Warn where the disk refuses to delete an old checkpoint: the run is saved, and goes on."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{path}: the old checkpoint could not be deleted: {error.strerror}; the run goes on", stacklevel=4
        )


def remove_leftovers(parent: Path) -> None:
    """Remove what a kill left half-written or half-removed, and undo an exchange that it cut in two."""
    for path in parent.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match:
            if match[2] == "outgoing":
                undo_exchange(path, parent / match[1])
            with _saved_all_the_same(path):
                if os.path.lexists(path):
                    _remove(path)
