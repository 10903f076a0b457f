"""A model on its device, as one of several processes trains it: whole in each (DDP) or in shares (FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import RuntimeSettings
from pipelines.training.distributed import Ranks
from pipelines.training.synchronized_norm import synchronize_batch_norms


def place_model(model: nn.Module, device: torch.device, ranks: Ranks, runtime: RuntimeSettings) -> nn.Module:
    """The model on its device, in shares if so asked, with batch normalization over all processes.

    A model that is to be shared goes there layer by layer, so that no device must hold the whole.
    """
    if ranks.size > 1:
        model = synchronize_batch_norms(model, device)
    if not (runtime.shard_model and ranks.joined):
        return model.to(device)
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(device)  # the buffers


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What a training step calls: the model, which adds up its gradients over the processes in the backward pass."""
    if not ranks.joined or isinstance(model, FSDPModule):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option has another name from torch 2.14 on
        # Its buffers need no broadcast at every step: batch normalization makes the same ones in all processes.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradients_synchronized(network: nn.Module, now: bool) -> Iterator[None]:
    """Inside, the backward pass adds up gradients over the processes only if it is the last of its step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    if isinstance(network, DistributedDataParallel) and not now:
        with network.no_sync():
            yield
    else:
        yield


def compile_model(model: nn.Module) -> None:
    """Have `torch.compile` make the forward pass; of a model in shares, each layer's, between which it is gathered."""
    for module in _layers(model) if isinstance(model, FSDPModule) else [model]:
        module.compile()


def _layers(model: nn.Module) -> list[nn.Module]:
    """What lies in the model's lists of layers and has weights."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [layer for layers in lists for layer in layers if any(True for _ in layer.parameters())]
