"""Conversion of `DTensor` parameters (FSDP2, tensor parallelism) to plain tensors for a step, and back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .base import State


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`. Does not import the DTensor module, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_plain(param: DTensor, state: State, is_whole: bool) -> tuple[nn.Parameter, State]:
    """Return a plain parameter with its gradient, and its state: whole if `is_whole`, else the local shard.

    The local shard shares its memory with `param`. With `is_whole` this is a collective: every rank must call it.
    """

    def plain(tensor: Tensor) -> Tensor:
        if not is_dtensor(tensor):
            return tensor
        if is_whole:
            return tensor.full_tensor()
        return tensor.redistribute(param.device_mesh, param.placements).to_local()

    tensor = nn.Parameter(plain(param.detach()), requires_grad=False)
    tensor.grad = None if param.grad is None else plain(param.grad)
    return tensor, {key: plain(value) for key, value in state.items()}


def from_plain(param: DTensor, tensor: Tensor, state: State, is_whole: bool) -> State:
    """Copy the weights of the plain parameter to `param`; returns the state, sharded like `param`."""
    from torch.distributed.tensor import DTensor, Replicate

    def sharded(value: Tensor) -> DTensor:
        if is_whole:
            copies = [Replicate()] * param.device_mesh.ndim
            return DTensor.from_local(value, param.device_mesh, copies, run_check=False).redistribute(
                placements=param.placements
            )
        return DTensor.from_local(
            value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    if is_whole:
        param.to_local().copy_(sharded(tensor.detach()).to_local())
    return {
        key: sharded(value) if key != "step" and value.shape == tensor.shape else value for key, value in state.items()
    }
