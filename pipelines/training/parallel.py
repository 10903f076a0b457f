"""Place a model on its device and parallelize it: replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from models.norms import LayerNorm
from pipelines.config import RuntimeSettings
from pipelines.training.distributed import Ranks
from pipelines.training.synchronized_norm import synchronize_batch_norms


def place_model(
    model: nn.Module,
    device: torch.device,
    ranks: Ranks,
    runtime: RuntimeSettings,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Move the model to its device; shard it if the settings ask for that; synchronize batch normalization over ranks.

    A sharded model moves layer by layer: no device holds all of it. With `dtype` bfloat16, its layers are gathered in
    bfloat16, except those with batch normalization and others that refuse it; gradients are reduced in float32.
    """
    if ranks.size > 1:
        synchronize_batch_norms(model)
    if not (runtime.shard_model and ranks.joined):
        return model.to(device)
    mesh = init_device_mesh(device.type, (ranks.size,))
    # FSDP2 gathers parameters of one dtype together: a bfloat16 embedding has a group of its own.
    embeddings = [child for child in model.children() if isinstance(child, nn.Embedding)]
    halves = [each for each in embeddings if each.weight.dtype == torch.bfloat16]
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=_layer_policy(dtype if _takes_bfloat16(layer) else torch.float32))
    for embedding in halves:
        fully_shard(embedding, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in float32: embeddings, the last normalization and the head
    return model.to(device)  # the buffers


def _layer_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return the precision of a layer whose forward pass autocast runs in `dtype`.

    Trap: autocast keeps its own copies of float32 weights for the backward pass, which then hold all layers at once.
    It copies no weights that FSDP2 has gathered in bfloat16. Inputs and outputs of layers stay as autocast makes them:
    a residual stream and normalizations in float32.
    """
    if dtype != torch.bfloat16:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _takes_bfloat16(layer: nn.Module) -> bool:
    """Whether the layer computes with bfloat16 parameters. PyTorch's normalizations refuse them for float32 inputs."""
    refusing = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return all(isinstance(module, LayerNorm) or not isinstance(module, refusing) for module in layer.modules())


def wrap_in_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap the model in DDP, where there is a process group. FSDP2 reduces its gradients by itself."""
    if not ranks.joined or isinstance(model, FSDPModule):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option has another name from torch 2.14 on
        # No broadcast of buffers: synchronized batch normalization computes the same ones on every rank.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradients_synchronized(network: nn.Module, now: bool) -> Iterator[None]:
    """Context manager around a backward pass: gradients are reduced over ranks only if `now`, once a step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    if isinstance(network, DistributedDataParallel) and not now:
        with network.no_sync():
            yield
    else:
        yield


def compile_model(model: nn.Module) -> None:
    """Compile the model in place; a sharded one layer by layer, since FSDP2 gathers the weights between layers.

    For the shapes that it gets: a graph for any batch size, which torch would make after a second size, is slower.
    """
    for module in _layers(model) if isinstance(model, FSDPModule) else [model]:
        module.compile(dynamic=False)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Children of the model's lists of layers that have weights."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [layer for layers in lists for layer in layers if any(True for _ in layer.parameters())]
