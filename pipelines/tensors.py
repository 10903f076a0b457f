"""A model's weights by name, whole or sharded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.errors import AsgoError

Tensors = dict[str, Tensor]


def model_tensors(model: nn.Module) -> Tensors:
    """Return the model's own parameters and saved buffers by name, a tied weight once."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, detached. Gathers a `DTensor`: every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def copy_into(own: Tensors, loaded: Tensors, source: str) -> None:
    """Copy whole tensors by name. Raises `AsgoError` with the first name that does not fit."""
    require_same_names(own, loaded, source)
    for name, tensor in own.items():
        if isinstance(tensor, DTensor):
            value = loaded[name].to(tensor.device)
            # No source rank: every rank has loaded the same value, so nothing is sent.
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(loaded[name])


def require_same_names(own: Tensors, loaded: Tensors, source: str) -> None:
    """Raise `AsgoError` unless both have the same names and shapes."""
    for name in {**own, **loaded}:
        if name not in loaded:
            raise AsgoError(f"{source}: of another model: it has no {name!r}")
        if name not in own:
            raise AsgoError(f"{source}: of another model: its {name!r} is not in this one")
        if own[name].shape != loaded[name].shape:
            shapes = f"{tuple(loaded[name].shape)} there, {tuple(own[name].shape)} here"
            raise AsgoError(f"{source}: of another model: the shape of {name!r} is {shapes}")
