"""State of any optimizer as tensors by name and JSON values. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.tensors import Tensors

_IN_TENSORS = ("tensor", "array", "number")
_UNSUPPORTED = (torch.complex128, torch.complex32)
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


class CannotPack(Exception):
    """A value is neither a tensor, a NumPy value, a JSON value, nor a container of those."""


def pack(value: Any, name: str, tensors: Tensors) -> Any:
    """Return a JSON value for `value`, and put its tensors into `tensors`, under names that begin with `name`.

    Lists are lists. Tensors, NumPy values, other containers and mappings (with any keys) become objects with one key.
    Raises `CannotPack` with the name for any other value, such as a function.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.dtype in _UNSUPPORTED:
            raise CannotPack(f"{name} is a tensor that safetensors cannot store ({value.layout}, {value.dtype})")
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        tensors[name] = torch.from_numpy(np.array(value))
        return {"array" if isinstance(value, np.ndarray) else "number": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [pack(each, f"{name}/{index}", tensors) for index, each in enumerate(value)]
    kind = "tuple" if isinstance(value, torch.Size) else type(value).__name__
    if isinstance(value, torch.Size) or type(value) is _CONTAINERS.get(kind):
        return {kind: [pack(each, f"{name}/{index}", tensors) for index, each in enumerate(value)]}
    if isinstance(value, Mapping):
        items = enumerate(value.items())
        return {"mapping": [[pack(k, f"{name}/{i}k", tensors), pack(v, f"{name}/{i}", tensors)] for i, (k, v) in items]}
    raise CannotPack(f"{name} is a {type(value).__module__}.{type(value).__qualname__}")


def unpack(packed: Any, tensors: Tensors) -> Any:
    """Return the value that `pack` was given; its tensors are those in `tensors`. A mapping becomes a dict."""
    if isinstance(packed, list):
        return [unpack(each, tensors) for each in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("array", "number"):
        array = tensors[content].numpy()
        return array[()] if kind == "number" else array
    if kind == "mapping":
        return {unpack(key, tensors): unpack(value, tensors) for key, value in content}
    return _CONTAINERS[kind](unpack(each, tensors) for each in content)


def pack_states(states: Mapping[str, Mapping[Any, Any]], tensors: Tensors) -> dict[str, Any]:
    """Return other values of states by `<name>/<key>`, and put tensors into `tensors` under the same names.

    A state with keys that cannot be parts of such a name is one value, `<name>/`.
    """
    values: dict[str, Any] = {}
    for name, state in states.items():
        has_names = all(isinstance(key, str) and key and "/" not in key for key in state)
        for key, value in state.items() if has_names else [("", dict(state))]:
            packed = pack(value, f"{name}/{key}", tensors)
            if not isinstance(value, Tensor):
                values[f"{name}/{key}"] = packed
    return values


def unpack_states(tensors: Tensors, values: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """Return the states that `pack_states` was given."""
    inner = set(_tensor_names(list(values.values())))
    plain: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in inner}
    states: dict[str, dict[Any, Any]] = {}
    for full_name, value in {**plain, **{name: unpack(each, tensors) for name, each in values.items()}}.items():
        name, _, key = full_name.rpartition("/")
        states.setdefault(name, {}).update({key: value} if key else value)
    return states


def _tensor_names(packed: Any) -> list[str]:
    if isinstance(packed, list):
        return [name for each in packed for name in _tensor_names(each)]
    if not isinstance(packed, dict):
        return []
    ((kind, content),) = packed.items()
    return [content] if kind in _IN_TENSORS else _tensor_names([content])


def same(a: Any, b: Any) -> bool:
    """Whether two packable values are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic) and isinstance(b, np.ndarray | np.generic):
        return type(a) is type(b) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)  # equal also where an element is NaN
