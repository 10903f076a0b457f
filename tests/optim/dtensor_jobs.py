"""What the ranks of test_dtensors.py do, each in a process of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from optim import ASGO, AccAsro, build_optimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "asgo": {"precond_frequency": 2}, "dasgo": {}, "muon": {}, "shampoo": {},
    "asro": {"decrement": 1e-3, "min_scale": 0.1},
    "accasro": {"increment": 5e-2, "decrement": 1e-3, "max_scale": 5.0, "min_scale": 0.1},
}  # fmt: skip


def make() -> nn.Module:
    """In float64; with a matrix and biases of fewer rows than ranks, square weights, and an embedding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 5)).double()


def make_sharded() -> nn.Module:
    model = make()
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def build(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return build_optimizer(model, name, 10, lr=1e-2, **SETTINGS[name])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model((torch.arange(8) * step) % 9).square().mean().backward()
        optimizer.step()


def difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((full(mine) - full(theirs)).abs().max().item() for mine, theirs in pairs)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def fsdp(name: str) -> dict[str, Any]:
    """Train under FSDP2 and as one process; then go on from a distributed checkpoint in a fresh optimizer."""
    model, sharded = make(), make_sharded()
    optimizer, sharded_optimizer = build(model, name), build(sharded, name)
    train(model, optimizer, range(3))
    train(sharded, sharded_optimizer, range(3))
    apart = difference(sharded, model)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(sharded, sharded_optimizer, options=whole)
    resumed = make_sharded()
    resumed_optimizer = build(resumed, name)
    with torch.no_grad():
        for mine, theirs in zip(resumed.parameters(), sharded.parameters(), strict=True):
            mine.copy_(theirs)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(resumed, resumed_optimizer, state if dist.get_rank() == 0 else {}, options=from_first)
    for each, its_optimizer in ((sharded, sharded_optimizer), (resumed, resumed_optimizer)):
        train(each, its_optimizer, range(3, 6))
    moments = [state["exp_avg"] for state in sharded_optimizer.state.values()]
    return {
        "apart": apart,
        "resumed": difference(resumed, sharded),
        "sharded": all(isinstance(each, DTensor) and each.placements == (Shard(0),) for each in moments),
    }


def other_placements() -> dict[str, float]:
    """Parameters that are sharded by columns or replicated, with gradients that are still to be summed."""
    mesh, apart = init_device_mesh("cpu", (2,)), {}
    weight, grad = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for kind, cls, keywords in (
        ("matrix", ASGO, {}),
        ("elements", AccAsro, {"lr": 1e-2, "total_steps": 10, **SETTINGS["accasro"]}),
    ):
        for placement in (Shard(1), Replicate()):
            plain = nn.Parameter(weight.clone())
            param = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
            optimizers = cls([plain], **keywords), cls([param], **keywords)
            for _ in range(2):
                plain.grad = grad.clone()
                param.grad = DTensor.from_local(grad * (dist.get_rank() + 1) / 3, mesh, [Partial()]).redistribute(
                    mesh, [placement]
                )
                for optimizer in optimizers:
                    optimizer.step()
            apart[f"{kind} {placement}"] = (param.full_tensor() - plain).abs().max().item()
    return apart
