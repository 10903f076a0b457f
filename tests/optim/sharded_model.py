"""A model with every kind of parameter, trained sharded and unsharded on the same gradients, and what to compare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optim import ShardedOptimizer, build_optimizer
from optim.matrix_optimizer import MatrixOptimizer
from optim.registry import optimizer_class

Tensors = dict[str, Tensor]
SETTINGS: dict[str, dict[str, Any]] = {
    "asro": {"decrement": 0.1, "min_scale": 0.5, "betas": (0.3, 0.99)},
    "accasro": {"increment": 0.2, "decrement": 0.1, "max_scale": 1.5, "min_scale": 0.5, "betas": (0.3, 0.99)},
    "rmsprop": {"momentum": 0.5},
}
STEPS = 6


class Model(nn.Module):
    """Every kind of parameter: a tied embedding, heads, odd shapes, tall and wide weights, kernels, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2051, 16)
        self.position = nn.Embedding(3, 1500)  # fewer rows than four ranks
        self.query = nn.Linear(16, 16)
        self.key = nn.Linear(16, 16, bias=False)
        self.up = nn.Linear(16, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 16)
        self.odd = nn.Linear(7, 13)
        self.row = nn.Linear(9, 1)
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(16, 2051, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def attention_row_blocks(self) -> dict[str, int]:
        return {"query.weight": 4, "key.weight": 4}


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def build(model: nn.Module, name: str, **settings: Any) -> torch.optim.Optimizer:
    is_matrix = issubclass(optimizer_class(name)[0], MatrixOptimizer)
    return build_optimizer(model, name, STEPS, lr=0.01, by_heads=is_matrix, **{**SETTINGS.get(name, {}), **settings})


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def set_gradients(model: nn.Module, step: int, missing: Iterable[str] = ()) -> None:
    for name, param in model.named_parameters():
        grad = gradient(name, tuple(param.shape), step).to(param.dtype)
        if isinstance(param, DTensor):
            rows = torch.chunk(grad, param.device_mesh.size())
            rank = param.device_mesh.get_local_rank()
            mine = rows[rank] if rank < len(rows) else grad[:0]
            grad = DTensor.from_local(
                mine, param.device_mesh, param.placements, run_check=False, shape=grad.shape, stride=grad.stride()
            )
        param.grad = None if name in missing else grad


@functools.cache
def process_group(size: int) -> dist.ProcessGroup | None:
    """The first `size` ranks; all ranks must ask for it."""
    return dist.new_group(list(range(size)))


@dataclass(frozen=True)
class Layout:
    """How many ranks train, and whether FSDP2 shards the model."""

    size: int
    fsdp: bool = False


LAYOUTS = [Layout(2), Layout(4), Layout(2, fsdp=True), Layout(3, fsdp=True)]


def shard(model: nn.Module, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], layout: Layout) -> Any:
    """The sharded optimizer of a model, which FSDP2 shards first where the layout says so."""
    group = process_group(layout.size)
    if layout.fsdp:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return ShardedOptimizer(optimizer_of(model), group)


def on_layouts(job: Callable[..., Any]) -> Callable[..., dict[Layout, Any]]:
    """Run a job with one layout after the other, on the ranks that belong to it."""

    @functools.wraps(job)
    def run(layouts: Iterable[Layout], *args: Any) -> dict[Layout, Any]:
        for layout in layouts:
            process_group(layout.size)
        return {layout: job(layout, *args) for layout in layouts if dist.get_rank() < layout.size}

    return run


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, on every rank."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def difference(left: Tensors, right: Tensors) -> float:
    """The largest difference of a tensor relative to its largest element; names, shapes and dtypes must be equal."""
    assert left.keys() == right.keys()
    return max((_difference(left[name], right[name]) for name in right), default=0.0)


def _difference(left: Tensor, right: Tensor) -> float:
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    scale = right.double().abs().max().clamp_min(1e-30)
    return ((left.double() - right.double()).abs().max() / scale).item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """An unsharded optimizer's state by name."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}


def flat(state: dict[str, Tensors]) -> Tensors:
    return {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()}


def everywhere(state: dict[str, Tensors] | None, group: dist.ProcessGroup | None) -> dict[str, Tensors]:
    """What rank 0 has gathered, on every rank."""
    box = [state]
    dist.broadcast_object_list(box, src=0, group=group)
    assert box[0] is not None
    return box[0]


def load_unsharded(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensors]) -> None:
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    by_index = {index: copy.deepcopy(state[name]) for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def train(model: nn.Module, optimizer: Any, steps: Iterable[int], missing: Iterable[str] = ()) -> None:
    """Steps with another learning rate each."""
    for step in steps:
        set_gradients(model, step, missing)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()
