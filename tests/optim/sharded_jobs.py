"""What the ranks of test_sharded.py do, each in a process of its own."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models.gpt import GPT, next_token_loss
from optim import ShardedOptimizer, build_optimizer, transport

from .sharded_model import (
    STEPS,
    Layout,
    Tensors,
    build,
    difference,
    everywhere,
    flat,
    load_unsharded,
    make_model,
    on_layouts,
    process_group,
    set_gradients,
    shard,
    state_of,
    train,
    whole,
)


@on_layouts
def compare(layout: Layout, name: str) -> dict[str, Any]:
    """Train sharded and unsharded; how far weights and, on rank 0, state are apart, and the weights' digest."""
    model, other = make_model(), make_model()
    unsharded = build(model, name)
    sharded = shard(other, lambda model: build(model, name), layout)
    train(model, unsharded, range(STEPS))
    train(other, sharded, range(STEPS))
    mine, theirs, state = whole(other), whole(model), sharded.gather_state()
    groups = [group["param_names"] for group in sharded.param_groups if group.get("rule") == "matrix"]
    return {
        "weights": difference(mine, theirs),
        "matrices are equal": all(torch.equal(mine[name], theirs[name]) for names in groups for name in names),
        "digest": [weight.double().sum().item() for weight in mine.values()],
        "state": None if state is None else difference(flat(state), flat(state_of(model, unsharded))),
    }


@on_layouts
def hand_over(layout: Layout, name: str) -> dict[str, Any]:
    """From unsharded to sharded and back: what is lost, and how far training strays from the unsharded one."""
    group = process_group(layout.size)
    model, other, third = make_model(), make_model(), make_model()
    unsharded = build(model, name)
    train(model, unsharded, range(2))
    before = copy.deepcopy(state_of(model, unsharded))
    other.load_state_dict(model.state_dict())
    sharded = shard(other, lambda model: build(model, name), layout)
    sharded.load_state(before)
    after = everywhere(sharded.gather_state(), group)
    train(model, unsharded, range(2, 4))
    train(other, sharded, range(2, 4))
    last = build(third, name)
    third.load_state_dict({**third.state_dict(), **whole(other)})
    load_unsharded(third, last, everywhere(sharded.gather_state(), group))
    train(model, unsharded, range(4, 6))
    train(third, last, range(4, 6))
    return {"loaded": difference(flat(after), flat(before)), "weights": difference(whole(third), whole(model))}


@on_layouts
def resume(layout: Layout, name: str) -> float:
    """Stop and go on with as many ranks; the difference to training without a stop."""
    group = process_group(layout.size)
    model, other = make_model(), make_model()
    undisturbed = shard(model, lambda model: build(model, name), layout)
    train(model, undisturbed, range(2))
    state, weights = everywhere(undisturbed.gather_state(), group), whole(model)
    with torch.no_grad():
        for param, weight in zip(other.parameters(), weights.values(), strict=True):
            param.copy_(weight)
    resumed = shard(other, lambda model: build(model, name), layout)
    resumed.load_state(state)
    train(model, undisturbed, range(2, 4))
    train(other, resumed, range(2, 4))
    return difference(whole(other), whole(model))


def _flops(optimizer: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


@on_layouts
def share_of_state_and_products(layout: Layout) -> tuple[float, float]:
    """This rank's share of the state's bytes, and of the products of matrices in a step, of ASGO on a small GPT."""
    settings = {"vocab_size": 256, "context_length": 32, "n_layers": 4, "n_heads": 2, "d_model": 32, "d_ff": 128}

    def build_asgo(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, "asgo", STEPS, root_method="polar_express")

    model, other = GPT(**settings), GPT(**settings)
    unsharded, sharded = build_asgo(model), shard(other, build_asgo, layout)
    set_gradients(model, 0)
    set_gradients(other, 0)
    flops, all_flops = _flops(sharded), _flops(unsharded)
    return _bytes(local_states(sharded)) / _bytes(unsharded.state.values()), flops / all_flops


def local_states(sharded: ShardedOptimizer) -> list[Tensors]:
    return [state for group in sharded._piece_groups for state in group.states().values()]


def _bytes(states: Iterable[dict[str, Tensor]]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state.values())


@on_layouts
def skip(layout: Layout, name: str) -> dict[str, Any]:
    """Parameters without gradients, some from the beginning, and at one step all of them."""
    model, other = make_model(), make_model()
    start = whole(model)
    unsharded, sharded = build(model, name), shard(other, lambda model: build(model, name), layout)
    never = ["embedding.weight", "up.weight", "conv.weight", "norm.bias"]
    everything = list(start)
    for training, optimizer in ((model, unsharded), (other, sharded)):
        train(training, optimizer, range(2), never)
        train(training, optimizer, [2], everything)
        train(training, optimizer, [3], [*never, "key.weight"])
    weights, state = whole(other), sharded.gather_state()
    return {
        "weights": difference(weights, whole(model)),
        "never": difference({key: weights[key] for key in never}, {key: start[key] for key in never}),
        "state": None if state is None else difference(flat(state), flat(state_of(model, unsharded))),
    }


@on_layouts
def start_fresh(layout: Layout, name: str) -> dict[str, float]:
    """Gather and load before the first step; how far the state and training stray from the unsharded optimizer's."""
    model, other = make_model(), make_model()
    unsharded, sharded = build(model, name), shard(other, lambda model: build(model, name), layout)
    state = everywhere(sharded.gather_state(), process_group(layout.size))
    of_state = difference(flat(state), flat(state_of(model, unsharded)))
    sharded.load_state(state)
    train(model, unsharded, range(2))
    train(other, sharded, range(2))
    return {"state": of_state, "weights": difference(whole(other), whole(model))}


@on_layouts
def keep_apart(layout: Layout, name: str) -> dict[str, float]:
    """How far training on changes a gathered state, and the state that was loaded."""
    model = make_model()
    sharded = shard(model, lambda model: build(model, name), layout)
    train(model, sharded, range(2))
    gathered = sharded.gather_state()
    before = copy.deepcopy(gathered)
    loaded = everywhere(gathered, process_group(layout.size))
    sharded.load_state(loaded)
    train(model, sharded, range(2, 4))
    kept = everywhere(before, process_group(layout.size))
    return {
        "loaded": difference(flat(loaded), flat(kept)),
        "gathered": 0.0 if gathered is None else difference(flat(gathered), flat(kept)),
    }


@on_layouts
def load_weights_late(layout: Layout, name: str) -> float:
    """Weights that are loaded, or put into other memory, after the optimizer was made are those that it trains."""
    model, other = make_model(seed=1), make_model()
    unsharded, sharded = build(model, name), shard(other, lambda model: build(model, name), layout)
    with torch.no_grad():
        for param, weight in zip(other.parameters(), model.parameters(), strict=True):
            if isinstance(param, DTensor):
                param.copy_(distribute_tensor(weight.detach(), param.device_mesh, param.placements))
            else:
                param.data = weight.detach().clone()
    train(model, unsharded, range(2))
    train(other, sharded, range(2))
    return difference(whole(other), whole(model))


@on_layouts
def mix(layout: Layout, name: str) -> float:
    """Two precisions in one group, and weights that do not lie row by row in memory."""

    def make() -> nn.Module:
        model = make_model()
        model.up.bfloat16()
        model.query.bfloat16()
        model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
        model.position.weight.data = model.position.weight.data.T.contiguous().T
        return model

    model, other = make(), make()
    unsharded, sharded = build(model, name), shard(other, lambda model: build(model, name), layout)
    train(model, unsharded, range(4))
    train(other, sharded, range(4))
    return difference(whole(other), whole(model))


@on_layouts
def collectives(layout: Layout, name: str) -> tuple[Counter[str], int]:
    """The collectives of a step on a small GPT, and the number of its parameter groups."""
    settings = {"vocab_size": 67, "context_length": 8, "n_layers": 3, "n_heads": 2, "d_model": 32, "d_ff": 64}
    model = GPT(**settings)
    sharded = shard(model, lambda model: build_optimizer(model, name, STEPS), layout)
    set_gradients(model, 0)
    names = ("broadcast", "all_gather", "all_reduce", "all_to_all_single", "send", "recv")
    counts: Counter[str] = Counter()

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return collective(*args, **keywords)

        return call

    with contextlib.ExitStack() as patches:
        for each in names:
            patches.enter_context(mock.patch.object(dist, each, counted(each, getattr(dist, each))))
        gather = counted("all-gather of vectors", transport._all_gather)
        patches.enter_context(mock.patch.object(transport, "_all_gather", gather))
        sharded.step()
    return counts, len(sharded.param_groups)


@on_layouts
def train_for_real(layout: Layout, name: str) -> float:
    """Forward, backward, a closure and a scheduler on a small GPT; all ranks see the same batch."""
    # Without biases: that of the keys has a gradient of rounding errors alone.
    settings = {"vocab_size": 67, "context_length": 8, "n_layers": 1, "n_heads": 2, "d_model": 12, "d_ff": 20}
    results: list[Tensors] = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        module = GPT(**settings, bias=False)
        optimizer: Any = build(module, name)
        model: nn.Module = module
        if is_sharded and not layout.fsdp:
            model = DistributedDataParallel(module, process_group=process_group(layout.size))
        if is_sharded:
            optimizer = shard(module, lambda module: build(module, name), layout)
        _train_on_tokens(model, optimizer)
        results.append(whole(module))
    return difference(results[1], results[0])


def _train_on_tokens(model: nn.Module, optimizer: Any) -> None:
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    tokens = torch.randint(67, (16, 9), generator=torch.Generator().manual_seed(0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        return loss

    for _ in range(STEPS):
        closure()
        scaler.unscale_(optimizer)
        assert optimizer.step(closure) is not None
        scheduler.step()


def refuse(case: str) -> str:
    """The error of a wrong use, the same on every rank."""
    try:
        _WRONG_USES[case](make_model())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _wrap(model: nn.Module, name: str = "asgo") -> ShardedOptimizer:
    return ShardedOptimizer(build(model, name))


def _take_a_step_before(model: nn.Module, name: str) -> None:
    optimizer = build(model, name)
    train(model, optimizer, [0])
    ShardedOptimizer(optimizer)


def _shard_columns(model: nn.Module, *placements: Any) -> None:
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    model.up.weight = nn.Parameter(distribute_tensor(model.up.weight.detach(), mesh, placements))
    _wrap(model)


def _make_sparse(model: nn.Module) -> None:
    optimizer = _wrap(model, "adamw")
    model.embedding.weight.grad = torch.zeros(2051, 16).to_sparse()
    optimizer.step()


def _load_wrong_shape(model: nn.Module) -> None:
    _wrap(model, "adamw").load_state({"embedding.weight": {"exp_avg": torch.zeros(16, 2051)}})


_WRONG_USES: dict[str, Callable[[Any], Any]] = {
    "unknown class": lambda model: ShardedOptimizer(torch.optim.LBFGS(model.parameters())),
    "no names": lambda model: ShardedOptimizer(torch.optim.AdamW(model.parameters())),
    "steps taken": lambda model: _take_a_step_before(model, "asgo"),
    "steps taken without a count": lambda model: _take_a_step_before(model, "muon"),
    "sharded by columns": lambda model: _shard_columns(model, Shard(1)),
    "not sharded": lambda model: _shard_columns(model, Replicate()),
    "sparse gradient": _make_sparse,
    "state_dict": lambda model: _wrap(model).state_dict(),
    "load_state_dict": lambda model: _wrap(model).load_state_dict({}),
    "another group": lambda model: _wrap(model).add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]}),
    "unknown name": lambda model: _wrap(model).load_state({"up.wieght": {}}),
    "state of another shape": _load_wrong_shape,
}
