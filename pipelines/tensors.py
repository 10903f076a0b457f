"""A model's weights by name, as they lie in this process's memory, whole or in shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.errors import AsgoError

Tensors = dict[str, Tensor]


def model_tensors(model: nn.Module) -> Tensors:
    """Weights and saved buffers by name, a tied weight once, as they lie in the model."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one in shares, from all processes."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def copy_into(own: Tensors, loaded: Tensors, source: str) -> None:
    """Copy whole tensors by name; `AsgoError` naming the first that does not fit."""
    require_same_names(own, loaded, source)
    for name, tensor in own.items():
        if isinstance(tensor, DTensor):
            value = loaded[name].to(tensor.device)
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(loaded[name])


def require_same_names(own: Tensors, loaded: Tensors, source: str) -> None:
    """`AsgoError` unless both hold the same names with the same shapes."""
    for name in {**own, **loaded}:
        if name not in loaded:
            raise AsgoError(f"{source}: of another model: it has no {name!r}")
        if name not in own:
            raise AsgoError(f"{source}: of another model: its {name!r} is not in this one")
        if own[name].shape != loaded[name].shape:
            shapes = f"{tuple(loaded[name].shape)} there, {tuple(own[name].shape)} here"
            raise AsgoError(f"{source}: of another model: the shape of {name!r} is {shapes}")
