"""Checkpoints: written whole or not at all, verified before they are believed, readable without a pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError

from pipelines.config import RunConfig, load_run_config
from pipelines.errors import AsgoError
from pipelines.storage import sha256_of, staged_folder, undo_exchange
from pipelines.training.metrics import Counts, Row, columns_to_rows, rows_to_columns
from pipelines.training.state import Tensors, TrainState, random_state, set_random_state

_FORMAT = 1
_PREFIX = "step-"
_STATE = "state.json"
_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_HISTORY = "history.safetensors"
_RANDOM = "rng-0.safetensors"


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
        """Weights by parameter name, on the CPU."""
        return safetensors.torch.load_file(self.folder / _MODEL)

    def rows(self) -> list[Row]:
        """The run's records up to this step."""
        return read_history(self.folder)


def read_history(folder: Path) -> list[Row]:
    """The records inside a checkpoint folder."""
    return columns_to_rows(safetensors.numpy.load_file(folder / _HISTORY))


def save_checkpoint(
    parent: Path, state: TrainState, config: RunConfig, description: dict[str, Any], counts: Counts
) -> Path:
    """Write `parent/step-<step>`, prune older ones, and return its path.

    Raises `AsgoError` if the disk refuses; then the checkpoints that were there still are.
    """
    target = parent / f"{_PREFIX}{state.step:08d}"
    optimizer_tensors, scalars = state.optimizer_tensors()
    content = {
        "format": _FORMAT,
        **counts,
        "config": config.model_dump(mode="json"),
        "data": description,
        "optimizer_scalars": scalars,
        "loss_scale": state.scaler.state_dict(),
    }
    try:
        with staged_folder(target, replace=True) as folder:
            _save_tensors(folder / _MODEL, state.model_tensors())
            _save_tensors(folder / _OPTIMIZER, optimizer_tensors)
            _save_tensors(folder / _RANDOM, random_state(state.clock.device))
            safetensors.numpy.save_file(rows_to_columns(state.rows), folder / _HISTORY)
            _write_state(folder, content)
        prune(parent, state.step, config.checkpoint.keep)
    except (OSError, SafetensorError) as error:
        raise AsgoError(f"{target}: could not be saved: {getattr(error, 'strerror', None) or error}") from error
    return target


def restore(checkpoint: Checkpoint, state: TrainState) -> None:
    """Bring a fresh state to where the checkpoint was saved, bit for bit."""
    saved = checkpoint.state
    state.load_model_tensors(checkpoint.model_tensors(), str(checkpoint.folder))
    optimizer_tensors = safetensors.torch.load_file(checkpoint.folder / _OPTIMIZER)
    state.load_optimizer_tensors(optimizer_tensors, saved["optimizer_scalars"])
    state.scaler.load_state_dict(saved["loss_scale"])
    state.step = checkpoint.step
    state.rows = checkpoint.rows()
    state.clock.restart_at(saved["elapsed_s"])
    set_random_state(safetensors.torch.load_file(checkpoint.folder / _RANDOM))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint, every byte of it; `AsgoError` saying what is wrong with it."""
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
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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


def checkpoint_folders(parent: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whether they verify or not."""
    return sorted(path for path in parent.glob(f"{_PREFIX}*") if path.is_dir())


def newest_checkpoint(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(parent)):
        try:
            return open_checkpoint(folder), skipped
        except AsgoError as error:
            skipped.append(f"skipped {error}")
    return None, skipped


def _save_tensors(path: Path, tensors: Tensors) -> None:
    # A transposed or channels-last tensor is saved by its values: loading copies them into the tensor's own layout.
    safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _write_state(folder: Path, content: dict[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    whole = {**content, "files": files}
    (folder / _STATE).write_text(json.dumps({**whole, "sha256": _digest(whole)}, indent=1), encoding="utf-8")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prune(parent: Path, newest_step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to a good one; later ones are damaged, and will be replaced."""
    steps = [path for path in checkpoint_folders(parent) if path.name <= f"{_PREFIX}{newest_step:08d}"]
    for path in steps[:-keep]:
        # Under a hidden name it is no checkpoint any more, however far its removal gets.
        doomed = path.with_name(f".{path.name}.pruned")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Remove what a kill left half-written or half-removed, and undo an exchange that it cut in two."""
    for path in parent.glob(f".{_PREFIX}*.outgoing"):
        undo_exchange(path, path.with_name(path.stem.removeprefix(".")))
    for path in parent.glob(f".{_PREFIX}*"):
        shutil.rmtree(path)
