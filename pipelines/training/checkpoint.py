"""Checkpoints: written atomically, verified by checksums before use, without pickle."""

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

from pipelines.config import ImportedOptimizerSettings, RunConfig, load_run_config
from pipelines.errors import AsgoError
from pipelines.shadow_settings import shadow_configs
from pipelines.storage import naming, parse_json, refuse_file, sha256_of, staged_folder, undo_exchange
from pipelines.tensors import Tensors
from pipelines.training.distributed import seed_of_rank
from pipelines.training.launched import launched
from pipelines.training.metrics import Counts, Row, columns_to_rows, rows_to_columns
from pipelines.training.random_state import gather_random_states, set_random_state
from pipelines.training.run_folder import RunFolder, checkpoint_folders, checkpoint_name, step_of
from pipelines.training.state import TrainState

_FORMAT = 1
STATE = "state.json"
_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_HISTORY = "history.safetensors"
_AVERAGE = "average.safetensors"
_SHADOWS = "shadows.safetensors"
_LAYOUT = ("name", "by_heads", "row_blocks")
"""Settings of an optimizer that determine the keys and shapes of its state."""
_NOT_LAYOUT = ("lr", "weight_decay")
"""Keywords that do not, in optimizers of other libraries, about which no more is known."""
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(partial|outgoing|pruned)")
"""Hidden folders of `staged_folder` and `prune`."""


def _random_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps made before it was saved."""
        return int(self.state["step"])

    def config(self) -> RunConfig:
        """Return the configuration of the run. Raises `AsgoError` if this version of asgo cannot read it."""
        try:
            return load_run_config(self.state["config"])
        except ValidationError:
            raise AsgoError(f"{self.folder}: its configuration is of another version of asgo") from None

    def model_tensors(self) -> Tensors:
        """Return the validated weights by parameter name, on the CPU; see `TrainState.gather_average`."""
        name = _AVERAGE if _AVERAGE in self.state["files"] else _MODEL
        return _load(self.folder / name)

    def rows(self) -> list[Row]:
        """Return the run's metrics up to this step."""
        return read_history(self.folder)


def read_history(folder: Path) -> list[Row]:
    """Return the metrics in a checkpoint folder."""
    with _readable(folder / _HISTORY):
        return columns_to_rows(safetensors.numpy.load_file(folder / _HISTORY))


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory, which training does not change."""

    step: int
    tensors: dict[str, Tensors]
    """Tensors by file name."""
    rows: list[Row]
    content: dict[str, Any]
    """Content of `state.json`."""

    @property
    def bytes(self) -> int:
        """Approximate number of bytes to write."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def take_snapshot(state: TrainState, config: RunConfig, description: dict[str, Any], counts: Counts) -> Snapshot | None:
    """Copy the run's state to host memory of rank 0; None on other ranks. A collective: every rank must call it."""
    optimizer_tensors, scalars = state.gather_optimizer()
    tensors = {_MODEL: state.gather_model(), _OPTIMIZER: optimizer_tensors}
    averages = state.gather_average()
    if averages:
        tensors[_AVERAGE] = averages
    shadow_records = [_gather_shadow(state, name, tensors.setdefault(_SHADOWS, {})) for name in state.shadows]
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
        **({"shadows": shadow_records} if shadow_records else {}),
    }
    return Snapshot(state.step, tensors, list(state.rows), content)


def _gather_shadow(state: TrainState, name: str, tensors: Tensors) -> dict[str, Any]:
    """Put the tensors of a shadow's state into `tensors`; returns the rest for `state.json`."""
    shadow, place = state.shadows[name], list(state.shadows).index(name)
    own, scalars = shadow.state.gather_optimizer()
    tensors |= {f"{place}/{key}": tensor for key, tensor in own.items()}
    return {"name": name, "updates": shadow.updates, "scalars": scalars}


def write_snapshot(parent: Path, snapshot: Snapshot, keep: int, check: Callable[[], None] = lambda: None) -> Path:
    """Write `parent/step-<step>` and keep the newest `keep` checkpoints; returns its path.

    Calls `check` before writing and before the final rename; it raises `AsgoError` to prevent them. Raises `AsgoError`
    if writing fails; older checkpoints then stay.
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
            check()  # its error says that the folder was deleted, not only that a file is missing
        reason = getattr(error, "strerror", None) or error
        raise AsgoError(
            f"{target}: could not be saved: {reason}; {last_good(parent)}; make room, then --resume"
        ) from error
    prune(parent, snapshot.step, keep)
    return target


def keeps_optimizer_state(saved: RunConfig, config: RunConfig) -> bool:
    """Whether the optimizer of a branch takes over the state. `by_heads` changes which matrices have a state."""
    before, now = saved.optimizer, config.optimizer
    if isinstance(before, ImportedOptimizerSettings) and isinstance(now, ImportedOptimizerSettings):
        old, new = before.keywords, now.keywords
        changed = {key for key in {**old, **new} if old.get(key) != new.get(key)}
        return before.name == now.name and changed <= {*_NOT_LAYOUT}
    return all(getattr(before, key, None) == getattr(now, key, None) for key in _LAYOUT)


def restore(checkpoint: Checkpoint, state: TrainState, config: RunConfig) -> None:
    """Load a checkpoint into a new state, bit for bit, with any number of ranks.

    The random numbers of each rank (dropout) continue exactly only with the same number of ranks. In a branch,
    `config` may differ from the checkpoint's: the state then keeps what the checkpoint cannot replace.
    """
    content, folder, saved = checkpoint.state, checkpoint.folder, checkpoint.config()
    weights = _load(folder / _MODEL)
    state.load_model(weights, str(folder))
    if state.average is not None:
        averaged = saved.training.ema_decay is not None
        state.load_average(_load(folder / _AVERAGE) if averaged else weights, str(folder))
    if keeps_optimizer_state(saved, config):
        state.load_optimizer(_load(folder / _OPTIMIZER), content["optimizer_scalars"])
    _restore_shadows(checkpoint, saved, state)
    if content["loss_scale"]:  # empty unless the precision was fp16
        state.scaler.load_state_dict(content["loss_scale"])
    state.step = checkpoint.step
    state.rows = checkpoint.rows()
    state.clock.restart_at(content["elapsed_s"])
    if config.seed == saved.seed and state.ranks.rank < content.get("processes", 1):
        set_random_state(_load(folder / _random_file(state.ranks.rank)))
    else:
        torch.manual_seed(seed_of_rank(config.seed, state.ranks.rank, state.step))


def _restore_shadows(checkpoint: Checkpoint, saved: RunConfig, state: TrainState) -> None:
    """Load the states of shadows that the checkpoint has, with the same layout of their state; others stay new."""
    records = checkpoint.state.get("shadows", [])
    tensors = _load(checkpoint.folder / _SHADOWS) if records else {}
    before = shadow_configs(saved)
    for place, record in enumerate(records):
        shadow, prefix = state.shadows.get(record["name"]), f"{place}/"
        if shadow is not None and keeps_optimizer_state(before[record["name"]], shadow.config):
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            shadow.state.load_optimizer(own, record["scalars"])
            shadow.updates = record["updates"]


def _load(path: Path) -> Tensors:
    """Return the tensors of a file, memory-mapped. Raises `AsgoError` if this rank's machine does not have the file."""
    if not path.is_file():
        raise AsgoError(
            f"{path}: {launched()} cannot find it; the run folder must be on a disk that all machines share"
        )
    with _readable(path):
        return safetensors.torch.load_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Context manager that raises `AsgoError` with the path if a file cannot be read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AsgoError(f"{getattr(error, 'filename', None) or path}: cannot be read: {reason}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify all checksums of a checkpoint and return it. Raises `AsgoError` if it is damaged or unreadable."""
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
    """Return the verified `state.json` of a checkpoint. Raises `AsgoError` if it is missing or altered."""
    path = folder / STATE
    try:
        with naming(path):
            state: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        recorded = state.pop("sha256")
    except FileNotFoundError:
        raise AsgoError(f"{folder}: not a checkpoint: it has no {STATE}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise AsgoError(f"{path}: damaged: not valid JSON with a checksum") from None
    if recorded != _digest(state):
        raise AsgoError(f"{path}: damaged: its content is not what was saved")
    if state["format"] != _FORMAT:
        raise AsgoError(f"{path}: a checkpoint of format {state['format']}; this version of asgo reads {_FORMAT}")
    return state


def last_good(parent: Path) -> str:
    """Return a clause that names the newest checkpoint, for error messages. Never raises."""
    folders = []
    with contextlib.suppress(OSError):
        folders = checkpoint_folders(parent)
    return f"the last valid checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"


def newest_checkpoint(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, and one line for each newer one that is not valid."""
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
    with naming(folder / STATE):
        (folder / STATE).write_text(json.dumps({**whole, "sha256": _digest(whole)}, indent=1), encoding="utf-8")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint at `path`, or a run's newest valid one, and one line for each newer one that is damaged.

    Raises `UsageError` for a file, and `AsgoError` if there is no valid checkpoint.
    """
    refuse_file(path)
    run = RunFolder(path)
    if not run.exists():
        return open_checkpoint(path), []
    checkpoint, skipped = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        run.config()  # raises if config.json is not a run's, as in a Hugging Face folder
        raise AsgoError("\n".join([f"{path}: no valid checkpoint in this run yet", *skipped]))
    return checkpoint, skipped


def prune(parent: Path, newest_step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `newest_step`. Later ones are damaged; the run will replace them."""
    steps = [path for path in checkpoint_folders(parent) if step_of(path) <= newest_step]
    for path in steps[:-keep]:
        # Rename first: a kill during the removal must not leave a damaged checkpoint.
        hidden = path.with_name(f".{path.name}.pruned")
        with _warning_if_not_deleted(path):
            path.rename(hidden)
            _remove(hidden)


def _remove(folder: Path) -> None:
    """Remove a folder, or a symbolic link to one, which `rmtree` refuses."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _warning_if_not_deleted(path: Path) -> Iterator[None]:
    """Context manager that warns if an old checkpoint cannot be deleted: the new one is saved, the run continues."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{path}: the old checkpoint could not be deleted: {error.strerror}; the run continues", stacklevel=4
        )


def remove_leftovers(parent: Path) -> None:
    """Remove folders that a kill left incomplete, and undo an interrupted exchange of `staged_folder`."""
    for path in parent.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match:
            if match[2] == "outgoing":
                undo_exchange(path, parent / match[1])
            with _warning_if_not_deleted(path):
                if os.path.lexists(path):
                    _remove(path)
