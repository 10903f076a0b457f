"""Base class of the optimizers of this package: argument checks, `step`, and state dicts that keep their dtypes."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .dtensors import from_plain, is_dtensor, to_plain
from .specs import RANGES, Range

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

State = dict[str, Tensor]
Group = dict[str, Any]
_Layout = dict[str, tuple[torch.Size, torch.dtype]]
Scalar = float | Tensor
"""A number, or a tensor of one element on the device where it is used."""

_MATRIX_KEYS = ("rule", "row_blocks", "batch_dims")
"""Parameter group keys that only matrix optimizers accept."""


class BaseOptimizer(torch.optim.Optimizer):
    """Base class: a subclass implements `update_group` and `initial_state`.

    State is kept in float32 for parameters of lower precision, else in the dtype of the parameter.
    """

    native_kernels = False
    """Whether the C kernels update large float32 parameters on a CPU."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_keywords(defaults)
        self._layouts: dict[object, _Layout] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled optimizer. Groups pickled before a keyword existed get its default."""
        super().__setstate__(state)
        self._layouts = {}
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: Group) -> None:
        """Set the missing keys of a group to their defaults, for groups not added through `add_param_group`."""
        for key, value in self.defaults.items():
            if key != "differentiable":  # the base class adds it to `defaults` on loading, but not to the groups
                group.setdefault(key, value)

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update in place `params`: the parameters of `group` that have a gradient and at least one element."""
        raise AssertionError("a subclass implements this")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; returns the loss of `closure` if one is given.

        `torch.compile` does not trace this method. Raises `ValueError` for a sparse gradient, and `RuntimeError`
        inside a CUDA graph without `capturable=True`.
        """
        self._refuse_wrong_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            self._complete(group)  # users may append to `param_groups` directly
            params = [param for param in group["params"] if param.grad is not None and param.numel() > 0]
            plain = [param for param in params if not is_dtensor(param)]
            if plain:
                self.update_group(group, plain)
            self._update_dtensors(group, [param for param in params if is_dtensor(param)])
        return loss

    def _update_dtensors(self, group: Group, params: list[DTensor]) -> None:
        """Update the local shards, all together; or gather and update one whole parameter at a time (`needs_whole`)."""
        is_whole = self.needs_whole(group)
        names = dict(zip(group["params"], group.get("param_names", []), strict=False))
        for together in [[param] for param in params] if is_whole else [params] * bool(params):
            plain_params = {}
            for param in together:
                tensor, state = to_plain(param, self.state[param], is_whole)
                plain_params[param], self.state[tensor] = tensor, state
            plain_group = {**group, "params": [*plain_params.values()]}
            if names:
                plain_group["param_names"] = [names.get(param, "without name") for param in together]
            try:
                self.update_group(plain_group, plain_group["params"])
            finally:
                for param, tensor in plain_params.items():
                    self.state[param] = from_plain(param, tensor, self.state.pop(tensor), is_whole)

    def needs_whole(self, group: Group) -> bool:
        """Whether the update needs whole parameters. If not, each rank updates its local shard."""
        return False

    def _refuse_wrong_capture(self) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            name = type(self).__name__
            raise RuntimeError(f"{name} counts steps on the host, which CUDA graphs do not record; use capturable=True")

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__} cannot use the sparse gradient of {describe(group, index)}"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. It may override any keyword of the constructor; unknown keys are kept.

        Raises `ValueError` for a misspelled keyword, a value out of range, or an unsupported parameter.
        """
        for key in param_group:
            if key in _MATRIX_KEYS and key not in self.group_keywords():
                name = type(self).__name__
                raise ValueError(f"parameter group key {key!r}: {name} does not treat weights as matrices")
            meant = misspelled(key, self.group_keywords())
            if meant is not None:
                raise ValueError(f"unknown parameter group key: {key!r}; did you mean {meant!r}?")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_keywords(group)
            for index, param in enumerate(group["params"]):
                self.check_param(group, index, param)
        except ValueError:
            self.param_groups.pop()
            raise

    def group_keywords(self) -> list[str]:
        """Return the parameter group keys that this optimizer reads."""
        return [*self.defaults]

    def initial_state(self, group: Group, param: Tensor) -> State:
        """Return the state of a parameter before its first step, on its device."""
        raise AssertionError("a subclass implements this")

    def prepare_states(self, group: Group, params: list[Tensor]) -> None:
        """Create the missing states, and check the others.

        Raises `ValueError` for a state whose shape or dtype does not fit its parameter.
        """
        rule = (group.get("rule"), str(group.get("row_blocks")), group.get("batch_dims"))
        for param in params:
            state = self.state[param]
            if not state:
                index = next(index for index, each in enumerate(group["params"]) if each is param)
                self.check_param(group, index, param)  # users may append to `group["params"]` directly
                state.update(self.initial_state(group, param))
                continue
            for key, (shape, dtype) in self._layout(group, param, rule).items():
                if key not in state or state[key].shape != shape or not _is_compatible(state[key].dtype, dtype, key):
                    raise self._wrong_state(group, param, key, f"{tuple(shape)}, {dtype}")

    def _layout(self, group: Group, param: Tensor, rule: tuple[object, ...]) -> _Layout:
        """Return shape and dtype of each state tensor of a parameter, from a cache."""
        kind = (param.shape, param.dtype, rule)
        if kind not in self._layouts:
            like = torch.empty(param.shape, dtype=param.dtype, device="meta")
            state = self.initial_state(group, like)
            self._layouts[kind] = {key: (value.shape, value.dtype) for key, value in state.items()}
        return self._layouts[kind]

    def _wrong_state(self, group: Group, param: Tensor, key: str, expected: str) -> ValueError:
        index = next(index for index, other in enumerate(group["params"]) if other is param)
        found = self.state[param].get(key)
        found = "missing" if found is None else f"{tuple(found.shape)}, {found.dtype}"
        text = f"{type(self).__name__}: the state {key!r} of {describe(group, index)} is {found}; it must be {expected}"
        return ValueError(text.replace("torch.", ""))

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """Raise `ValueError` if this optimizer does not support the parameter."""
        if not param.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes real parameters; {describe(group, index)} is {param.dtype}")

    def step_device(self, group: Group, param: Tensor) -> torch.device:
        """Return the device of a parameter's step count: the CPU unless `capturable`, for CUDA graphs."""
        return param.device if group["capturable"] else torch.device("cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict. Unlike the base class, keep the dtype of each tensor (int8 signs, float32 moments)."""
        saved: dict[str, Any] = {}
        # Pre-hook last, post-hook first: users' pre-hooks may change the state, and their post-hooks see the result.
        before = self.register_load_state_dict_pre_hook(lambda _, final: saved.update(final))
        after = self.register_load_state_dict_post_hook(lambda _: self._restore_tensors(saved), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore_tensors(self, saved: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True):
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                for key, value in saved["state"].get(saved_id, {}).items():
                    device = self.step_device(group, param) if key == "step" else param.device
                    self.state[param][key] = _restored(value, param, device)


def _restored(value: Tensor | float, param: Tensor, device: torch.device) -> Tensor:
    """Copy a saved value in its own dtype. A tensor of the parameter's shape gets the parameter's strides."""
    tensor = torch.as_tensor(value)
    if tensor.shape != param.shape:
        return tensor.to(device=device, copy=True)
    return torch.empty_like(param, dtype=tensor.dtype, device=device).copy_(tensor)


def _is_compatible(found: torch.dtype, expected: torch.dtype, key: str) -> bool:
    """Whether a state may have this dtype instead of the expected one: step counts and signs fit in any dtype."""
    return found is expected or key == "step" or not expected.is_floating_point


def describe(group: Group, index: int) -> str:
    """Return name and shape of a parameter for messages; without a name, its index and shape."""
    shape = tuple(group["params"][index].shape)
    names = group.get("param_names", [])
    is_named = index < len(names)  # a parameter appended to `group["params"]` directly has no name
    return f"parameter {names[index]!r} of shape {shape}" if is_named else f"parameter {index} of shape {shape}"


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state and of the arithmetic of its update: float32 or wider."""
    return torch.promote_types(param.dtype, torch.float32)


def new_step(device: torch.device) -> Tensor:
    """Return a step count of zero. Always float32: bfloat16 cannot count beyond 256."""
    return torch.zeros((), dtype=torch.float32, device=device)


def gradient(param: Tensor, maximize: bool) -> Tensor:
    """Return the gradient of a parameter in the dtype of its state, negated if `maximize`."""
    assert param.grad is not None
    grad = param.grad.to(state_dtype(param))
    return -grad if maximize else grad


def on_host(value: Scalar) -> Scalar:
    """Convert a CPU tensor of one element to a number. Others are returned: reading them would wait for the GPU."""
    return value.item() if isinstance(value, Tensor) and can_be_read(value) else value


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is not of a subclass, whose data may be stored elsewhere or not exist (fake tensors)."""
    return type(tensor) in (Tensor, nn.Parameter)


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read the elements of a tensor without a copy from a device."""
    return is_plain(tensor) and tensor.device.type == "cpu"


def check_keywords(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the first invalid value, with its keyword."""
    for name, value in values.items():
        if name == "row_blocks" and not _is_blocks(value):
            wanted = "a number of equal blocks of rows, or the rows of each block"
        elif name in RANGES and not _is_within(RANGES[name], value):
            wanted = RANGES[name].words
        else:
            continue
        if isinstance(value, Tensor) and value.numel() != 1:  # its repr may fill many lines
            shape = tuple(value.shape)
            raise ValueError(f"invalid {name}: it must be {wanted}; a Tensor {name} must be 1-element, not {shape}")
        raise ValueError(f"invalid {name}: {value!r}; it must be {wanted}")
    if "min_scale" in values:
        min_scale, max_scale = values["min_scale"], values.get("max_scale", 1.0)
        if min_scale > max_scale:
            raise ValueError(f"invalid min_scale: {min_scale!r} is above max_scale, {max_scale!r}")
    if values.get("capturable") and values.get("precond_frequency", 1) != 1:
        raise ValueError("invalid precond_frequency: a CUDA graph repeats one step, so capturable=True needs 1")


def _is_within(wanted: Range, value: Any) -> bool:
    if wanted.length > 1:
        is_tuple = isinstance(value, tuple | list) and len(value) == wanted.length
        return is_tuple and all(_is_within(replace(wanted, length=1), each) for each in value)
    if wanted.type is bool:
        return isinstance(value, bool)
    if wanted.choices:
        return value in wanted.choices
    return (
        (_is_whole(value) if wanted.type is int else _is_number(value))
        and (wanted.ge is None or value >= wanted.ge)
        and (wanted.gt is None or value > wanted.gt)
        and (wanted.lt is None or value < wanted.lt)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_blocks(value: Any) -> bool:
    sizes = value if isinstance(value, tuple | list) else [value]
    return value is None or (len(sizes) > 0 and all(_is_whole(size) and size >= 1 for size in sizes))


def misspelled(key: str, keywords: Iterable[str]) -> str | None:
    """Return the keyword that a parameter group's key misspells, or None.

    Training loops and schedulers keep keys of their own in groups (`name`, `lr_scale`, `max_lr`), so only a key very
    similar to a keyword is a mistake. A key that contains a keyword, such as `weight_decay_mult`, is not one, and
    keywords of two or three letters are too short to compare.
    """
    if any(f"_{keyword}_" in f"_{key}_" for keyword in keywords):
        return None
    long = [keyword for keyword in keywords if len(keyword) > 3 or keyword == key.lower()]
    return next(iter(difflib.get_close_matches(key.lower(), long, n=1, cutoff=0.85)), None)
