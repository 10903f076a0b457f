"""What all optimizers here share: checks, the step, and a state that loads in the precision it was saved in."""

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

from .dtensors import is_dtensor, put_back, stand_in
from .specs import RANGES, Range

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

State = dict[str, Tensor]
Group = dict[str, Any]
_Layout = dict[str, tuple[torch.Size, torch.dtype]]
Scalar = float | Tensor
"""A number, or a tensor of one element on the device where it is used."""

_MATRIX_KEYS = ("rule", "row_blocks", "batch_dims")
"""Keys of parameter groups that mean something to a matrix optimizer alone."""


class BaseOptimizer(torch.optim.Optimizer):
    """Template: a subclass implements `update_group`, and inherits everything that a training loop touches.

    State is kept in float32 for parameters of lower precision, else in the parameter's own precision.
    """

    native_kernels = False
    """Whether large float32 parameters on a CPU take the kernels in C."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_keywords(defaults)
        self._layouts: dict[object, _Layout] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups that were saved before a keyword existed its default."""
        super().__setstate__(state)
        self._layouts = {}
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: Group) -> None:
        """Give a group that came otherwise than through `add_param_group` the defaults of the keys that it lacks."""
        for key, value in self.defaults.items():
            if key != "differentiable":  # which the base adds to the defaults, never to the groups, when it loads
                group.setdefault(key, value)

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update `params`, those of `group` that have a gradient and any element, in place."""
        raise AssertionError("a subclass implements this")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients at hand; returns the loss of `closure` where one is given.

        `torch.compile` leaves it as it is, kernels and all. Raises `ValueError` for a sparse gradient, and
        `RuntimeError` inside a CUDA graph without `capturable=True`.
        """
        self._refuse_wrong_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            self._complete(group)  # it may have been appended by hand
            params = [param for param in group["params"] if param.grad is not None and param.numel() > 0]
            plain = [param for param in params if not is_dtensor(param)]
            if plain:
                self.update_group(group, plain)
            self._update_dtensors(group, [param for param in params if is_dtensor(param)])
        return loss

    def _update_dtensors(self, group: Group, params: list[DTensor]) -> None:
        """Update what this rank holds; or all of one parameter after the other, where the rule needs it whole."""
        is_whole = self.needs_whole(group)
        names = dict(zip(group["params"], group.get("param_names", []), strict=False))
        for together in [[param] for param in params] if is_whole else [params] * bool(params):
            stand_ins = {}
            for param in together:
                tensor, state = stand_in(param, self.state[param], is_whole)
                stand_ins[param], self.state[tensor] = tensor, state
            plain = {**group, "params": [*stand_ins.values()]}
            if names:
                plain["param_names"] = [names.get(param, "without name") for param in together]
            try:
                self.update_group(plain, plain["params"])
            finally:
                for param, tensor in stand_ins.items():
                    self.state[param] = put_back(param, tensor, self.state.pop(tensor), is_whole)

    def needs_whole(self, group: Group) -> bool:
        """Whether the rule of a group needs its parameters whole; else each rank updates the part it holds."""
        return False

    def _refuse_wrong_capture(self) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            name = type(self).__name__
            raise RuntimeError(f"{name} counts its steps on the host, which a CUDA graph misses; use capturable=True")

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__} cannot use the sparse gradient of {describe(group, index)}"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with any keyword of the constructor overridden for them; other keys are kept for others.

        Raises `ValueError` for a misspelled keyword, a value out of range, or a parameter this optimizer cannot take.
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
        """The keys of a parameter group that this optimizer reads."""
        return [*self.defaults]

    def initial_state(self, group: Group, param: Tensor) -> State:
        """The state of a parameter before its first step, on its device."""
        raise AssertionError("a subclass implements this")

    def prepare_states(self, group: Group, params: list[Tensor]) -> None:
        """Give parameters their state before their first step.

        Raises `ValueError` for a state that does not fit its parameter, loaded or changed from outside.
        """
        rule = (group.get("rule"), str(group.get("row_blocks")), group.get("batch_dims"))
        for param in params:
            state = self.state[param]
            if not state:
                index = next(index for index, each in enumerate(group["params"]) if each is param)
                self.check_param(group, index, param)  # it may have been appended to the group by hand
                state.update(self.initial_state(group, param))
                continue
            for key, (shape, dtype) in self._layout(group, param, rule).items():
                if key not in state or state[key].shape != shape or not _may_stand_for(state[key].dtype, dtype, key):
                    raise self._wrong_state(group, param, key, f"{tuple(shape)}, {dtype}")

    def _layout(self, group: Group, param: Tensor, rule: tuple[object, ...]) -> _Layout:
        """Shape and dtype of each state tensor of a parameter."""
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
        """Raise `ValueError` if this optimizer cannot take the parameter."""
        if not param.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes real parameters; {describe(group, index)} is {param.dtype}")

    def step_device(self, group: Group, param: Tensor) -> torch.device:
        """Where a parameter's count of steps lives: on the host, unless the step is to be captured in a CUDA graph."""
        return param.device if group["capturable"] else torch.device("cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike the base class, keep each tensor's own dtype (int8 signs, float32 moments)."""
        saved: dict[str, Any] = {}
        # Last before and first after the base class does its work, so that hooks of others have their say.
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
    """A copy of what was saved, in its own dtype; laid out in memory as the parameter, where it has its shape."""
    tensor = torch.as_tensor(value)
    if tensor.shape != param.shape:
        return tensor.to(device=device, copy=True)
    return torch.empty_like(param, dtype=tensor.dtype, device=device).copy_(tensor)


def _may_stand_for(found: torch.dtype, expected: torch.dtype, key: str) -> bool:
    """Whether PyTorch operations take a state in this dtype for the expected: any holds a sign, or counts steps."""
    return found is expected or key == "step" or not expected.is_floating_point


def describe(group: Group, index: int) -> str:
    """A parameter as a user knows it: its name where names were given, else its position and shape."""
    shape = tuple(group["params"][index].shape)
    names = group.get("param_names", [])
    is_named = index < len(names)  # not one that was appended to the group by hand
    return f"parameter {names[index]!r} of shape {shape}" if is_named else f"parameter {index} of shape {shape}"


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision in which a parameter's state is kept and its update computed."""
    return torch.promote_types(param.dtype, torch.float32)


def new_step(device: torch.device) -> Tensor:
    """A parameter's count of steps, zero; in float32 whatever the default dtype: bfloat16 ends at 256."""
    return torch.zeros((), dtype=torch.float32, device=device)


def gradient(param: Tensor, maximize: bool) -> Tensor:
    """What to descend along: the gradient of a parameter, in the precision of its state, negated to maximize."""
    assert param.grad is not None
    grad = param.grad.to(state_dtype(param))
    return -grad if maximize else grad


def on_host(value: Scalar) -> Scalar:
    """A tensor of one element as a number, unless it is on a device, for which reading it would make the host wait."""
    return value.item() if isinstance(value, Tensor) and can_be_read(value) else value


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its own numbers: it is of no subclass, which may hold them elsewhere, or have none."""
    return type(tensor) in (Tensor, nn.Parameter)


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host may look at the numbers of a tensor: they are in its memory."""
    return is_plain(tensor) and tensor.device.type == "cpu"


def check_keywords(values: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming keyword and value, for the first value that its keyword cannot take."""
    for name, value in values.items():
        if name == "row_blocks" and not _is_blocks(value):
            wanted = "a number of equal blocks of rows, or the rows of each block"
        elif name in RANGES and not _is_within(RANGES[name], value):
            wanted = RANGES[name].words
        else:
            continue
        if isinstance(value, Tensor) and value.numel() != 1:  # its numbers may fill many lines
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
    if wanted.is_pair:
        is_pair = isinstance(value, tuple | list) and len(value) == 2
        return is_pair and all(_is_within(replace(wanted, is_pair=False), each) for each in value)
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
    """The keyword that a parameter group's key misspells; None for a keyword, and for a key that others read.

    Training loops and schedulers keep keys of their own in groups (`name`, `lr_scale`, `max_lr`): only what is nearly
    a keyword is taken for a mistake. A keyword with other words, such as `weight_decay_mult`, is none, and a keyword of
    two or three letters is too short to be nearly another word.
    """
    if any(f"_{keyword}_" in f"_{key}_" for keyword in keywords):
        return None
    long = [keyword for keyword in keywords if len(keyword) > 3 or keyword == key.lower()]
    return next(iter(difflib.get_close_matches(key.lower(), long, n=1, cutoff=0.85)), None)
