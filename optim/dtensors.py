"""DTensors, as FSDP2 and tensor parallelism make parameters: plain tensors take their places for a step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .base import State


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether each rank holds a part of the tensor; without loading the module, which takes a second, if nobody did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def stand_in(param: DTensor, state: State, is_whole: bool) -> tuple[nn.Parameter, State]:
    """A plain parameter with gradient and its state: all of them, the same on all ranks, or what this rank holds.

    What this rank holds shares its memory. All ranks must ask for all of a parameter at once.
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


def put_back(param: DTensor, tensor: Tensor, state: State, is_whole: bool) -> State:
    """Give a parameter the weights of its stand-in; returns the state, with tensors of its shape sharded alike."""
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
