"""What the training loop does for an optimizer of another library: exact saving, its modes, its random numbers."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.config import ImportedOptimizerSettings
from pipelines.errors import AsgoError, UsageError
from pipelines.imported_optimizers import one_line
from pipelines.tensors import Tensors
from pipelines.training.distributed import seed_of_rank
from pipelines.training.packing import CannotPack, pack_states, same, unpack_states

_STEPS = 12
"""Steps of a rehearsal before and after saving. Preconditioners are often updated every ten steps."""
_LONGEST_SIDE = 5
_PARAMETERS_OF_A_SHAPE = 3
_OPTIMIZER = ""
"""Name of the state that belongs to no parameter."""
_STRIDES = "/strides"
"""Key of the strides of tensors that are not contiguous; checkpoints hold contiguous ones."""
_GLOBAL_RANK = 0
"""The optimizer draws the same random numbers on all ranks: else their replicas would differ."""

_MISSING = object()


class ImportedOptimizer:
    """An optimizer of another library. Its own methods and `state_dict` are its only interface.

    Some have a training and an evaluation mode (`train()`, `eval()`), in which the model has other weights, such as
    schedule-free ones: it is in training mode but for `evaluation_weights`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], scheduled: Collection[str]
    ) -> None:
        """`params` are the model's, by name; `scheduled` the keys of groups that the schedule sets at every step.

        Raises `UsageError` if the optimizer's state cannot be read.
        """
        self.optimizer = optimizer
        self._is_checked = False
        self._names = {param: name for name, param in params.items() if param.requires_grad}
        self._left_out = {"params", "param_names", *scheduled}
        self._scheduled = [{key: group[key] for key in scheduled if key in group} for group in optimizer.param_groups]
        self.has_modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
        try:
            self._set_mode("train")
            self._fresh = self._global_state()
        except (Exception, SystemExit) as error:  # code of other libraries may raise anything
            what = f"--optimizer {type(optimizer).__name__}: its train() or state_dict() raises {one_line(error)}"
            raise UsageError(what) from error

    def reset_schedule(self) -> None:
        """Set the scheduled values of the groups to those of the new optimizer, as the schedule does at every step."""
        for group, values in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            group.update(values)

    def _set_mode(self, mode: str) -> None:
        if self.has_modes:
            getattr(self.optimizer, mode)()

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Context manager in which the model has the weights to evaluate. Restores the others bit for bit."""
        if not self.has_modes:
            yield
            return
        saved = [param.detach().clone() for param in self._names]
        self._set_mode("eval")
        try:
            yield
        finally:
            self._set_mode("train")  # computes the weights again, but rounded differently
            with torch.no_grad():
                for param, value in zip(self._names, saved, strict=True):
                    param.copy_(value)

    def _global_state(self) -> dict[str, Any]:
        """Return a copy of what `state_dict` has besides the states of parameters and settings of the schedule."""
        content = self.optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if key not in self._left_out}
            for group in content["param_groups"]
        ]
        other = {key: value for key, value in content.items() if key not in ("state", "param_groups")}
        state = {key: value for key, value in content["state"].items() if not isinstance(key, int)}
        return copy.deepcopy({"groups": dict(enumerate(groups)), "other": other, "state": state})

    def gather_state(self, tensors: Tensors) -> dict[str, Any]:
        """Return the values of the state, and put its tensors into `tensors`; see `pack_states`.

        Of state that belongs to no parameter, only what a new optimizer does not have. Raises `CannotPack`.
        """
        members = self._members()
        in_order = [name for names in members for name in names]
        packed = self.optimizer.state_dict()["state"]
        states = {in_order[key]: state for key, state in packed.items() if isinstance(key, int)}
        own = _changes(self._global_state(), self._fresh)
        if "groups" in own:
            own["members"] = members  # a branch may have other groups
        values = pack_states({**states, _OPTIMIZER: own}, tensors)
        strides = {name: tensor.stride() for name, tensor in tensors.items() if not tensor.is_contiguous()}
        return {**values, _STRIDES: strides} if strides else values

    def _members(self) -> list[list[str]]:
        """Return the names of the parameters of each group."""
        return [[self._names[param] for param in group["params"]] for group in self.optimizer.param_groups]

    def load_state(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Load what `gather_state` returned into a new optimizer."""
        strides = values.get(_STRIDES, {})
        tensors = {name: _laid_out(tensor, strides.get(name)) for name, tensor in tensors.items()}
        states = unpack_states(tensors, {name: value for name, value in values.items() if name != _STRIDES})
        saved = states.pop(_OPTIMIZER, {})
        group_of = {name: index for index, names in enumerate(saved.pop("members", [])) for name in names}
        changed = saved.pop("groups", {})
        own = _merged(self._fresh, saved)
        groups = self.optimizer.state_dict()["param_groups"]
        for index, names in enumerate(self._members()):
            before = group_of.get(names[0])
            groups[index] = {**groups[index], **_merged(own["groups"][index], changed.get(before, {}))}
        in_order = [param for group in self.optimizer.param_groups for param in group["params"]]
        places = {self._names[param]: index for index, param in enumerate(in_order)}
        by_place: dict[Any, Any] = {places[name]: state for name, state in states.items()}
        self.optimizer.load_state_dict({**own["other"], "state": {**by_place, **own["state"]}, "param_groups": groups})
        for name, state in states.items():
            param = in_order[places[name]]
            self.optimizer.state[param] = _with_dtypes(self.optimizer.state[param], state)

    def _check_first_step(self) -> None:
        """Raise `AsgoError` after the first step if groups have changed, or if the state cannot be saved."""
        if self._is_checked:
            return
        self._is_checked = True
        name = type(self.optimizer).__name__
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        if len(self.optimizer.param_groups) != len(self._fresh["groups"]) or {*params} - {*self._names}:
            raise AsgoError(f"the optimizer, {name}, adds parameters or groups in a step, which asgo does not support")
        try:
            self.gather_state({})
        except CannotPack as error:
            raise AsgoError(f"the state of the optimizer, {name}, cannot be saved: {error}") from None

    @contextlib.contextmanager
    def around_step(self, seed: int, step: int, device: torch.device) -> Iterator[None]:
        """Context manager around a step: its random numbers depend on seed and step only, on all ranks alike.

        Raises `AsgoError` if the optimizer raises an error.
        """
        of_step = seed_of_rank(seed, _GLOBAL_RANK, step)
        python, numpy = random.getstate(), np.random.get_state()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(of_step)
            random.seed(of_step)
            np.random.seed(of_step % 2**32)
            try:
                yield
                self._check_first_step()
            except (torch.OutOfMemoryError, AsgoError):
                raise
            except (Exception, SystemExit) as error:
                what = f"step {step + 1}: the optimizer, {type(self.optimizer).__name__}, raises {one_line(error)}"
                raise AsgoError(f"{what}; earlier checkpoints are not affected") from error
            finally:
                random.setstate(python)
                np.random.set_state(numpy)


def rehearse(
    settings: ImportedOptimizerSettings,
    optimizer: torch.optim.Optimizer,
    scheduled: Collection[str],
    device: torch.device,
) -> str | None:
    """Save and load an optimizer with the same settings and a few tiny parameters; return a warning if that fails.

    Makes some steps, saves, loads into a new optimizer, and makes further steps with both. The parameters must then be
    equal, bit for bit.

    Args:
        settings: the optimizer's settings.
        optimizer: the new optimizer of the run, for its groups.
        scheduled: the keys of groups that the schedule sets at every step.
        device: where the run trains.

    Raises:
        UsageError: the optimizer cannot make a step, or its state cannot be saved without pickle.
    """

    def new() -> tuple[ImportedOptimizer, list[Tensor]]:
        groups = [_small(group, device) for group in optimizer.param_groups]
        params: list[Tensor] = [param for group in groups for param in group["params"]]
        built = type(optimizer)(groups, **settings.keywords)
        return ImportedOptimizer(built, {str(index): param for index, param in enumerate(params)}, scheduled), params

    name = f"--optimizer {settings.name}"
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):  # compiling may take minutes
        torch.manual_seed(0)
        with _explained(name):
            first, params = new()
            for step in range(_STEPS):
                _make_step(first, params, step, device)
            with first.evaluation_weights():
                first.optimizer.zero_grad()
            tensors: Tensors = {}
            values = first.gather_state(tensors)
        saved = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        warning = f"{name}: this run cannot be resumed exactly: "
        try:
            second, loaded = new()
            with torch.no_grad():
                for param, value in zip(loaded, params, strict=True):
                    param.copy_(value)
            second.load_state(saved, values)
            for step in range(_STEPS, 2 * _STEPS):
                _make_step(first, params, step, device)
                _make_step(second, loaded, step, device)
        except (Exception, SystemExit) as error:
            return f"{warning}loading its state raises {one_line(error)}"
        if all(map(same, params, loaded)):
            return None
        return f"{warning}it has state that its state_dict() does not contain, or that it does not load as it was"


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Context manager that raises an error in the steps of a rehearsal as a `UsageError` with the optimizer's name."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, AsgoError) and error.__cause__ is None:
            raise UsageError(f"{name}: {error}; asgo saves tensors, numbers and texts, without pickle") from None
        reason = one_line(error.__cause__ or error)
        hint = "; a second backward pass is not supported" if "grad_fn" in reason else ""
        raise UsageError(f"{name}: a step with it raises {reason}{hint}") from error


def _make_step(imported: ImportedOptimizer, params: Sequence[Tensor], step: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    imported.reset_schedule()
    with imported.around_step(0, step, device):
        imported.optimizer.step()


def _small(group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a group with a few tiny parameters, of as many dimensions as those of the group have."""
    by_dims: dict[int, list[Tensor]] = {}
    for param in group["params"]:
        by_dims.setdefault(param.ndim, []).append(param)
    shapes = [
        [min(size, _LONGEST_SIDE - (index + place) % 2) for place, size in enumerate(param.shape)]
        for alike in by_dims.values()
        for index, param in enumerate(alike[:_PARAMETERS_OF_A_SHAPE])
    ]
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    return {**copy.deepcopy({key: value for key, value in group.items() if key != "params"}), "params": params}


def _laid_out(tensor: Tensor, strides: Sequence[int] | None) -> Tensor:
    """Return a copy with these strides; contiguous if there are none, or if elements would overlap.

    Trap: matrix kernels round differently for a transposed matrix, and for one that starts at an odd address, as the
    tensors of a file may.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides or (), strict=False))
    if strides is None or extent != tensor.numel():
        return tensor.clone()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _changes(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of `now` that differ from those of `before`; of mappings, their entries that differ.

    What a constructor makes is not saved: it may be a function. heavyball even pickles one in its `state_dict`.
    """
    changed: dict[Any, Any] = {}
    for key, value in now.items():
        old = before.get(key, _MISSING)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = _changes(value, old)
            if value:
                changed[key] = value
        elif not same(value, old):
            changed[key] = value
    return changed


def _merged(before: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return `before` with the entries that `_changes` returned.

    Trap: heavyball unpickles bytes of its `state_dict`, and would unpickle an array of bytes just as well. What `pack`
    refuses in a new optimizer cannot have been saved, so a checkpoint that replaces it is forged. Raises `AsgoError`.
    """
    merged = dict(before)
    for key, value in changes.items():
        old = before.get(key)
        if isinstance(old, bytes | bytearray) or callable(old):
            raise AsgoError(f"the optimizer's {key!r} is not something that asgo saves")
        merged[key] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


def _with_dtypes(loaded: Any, saved: Any) -> Any:
    """Return a loaded state with the dtypes that were saved: `load_state_dict` casts to that of the parameter."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _with_dtypes(value, saved.get(key)) for key, value in loaded.items()}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple):
        return type(loaded)(_with_dtypes(value, other) for value, other in zip(loaded, saved, strict=True))
    return loaded
