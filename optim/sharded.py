"""Any optimizer of the registry, its state and its work shared out among the ranks of a process group."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Group, State, describe
from .dtensors import is_dtensor
from .pieces import (
    SPLIT_FROM,
    Piece,
    WholeState,
    Wire,
    chunked_rows,
    even_rows,
    matrix_cost,
    owners,
    part_of_state,
    receive_state,
    send_state,
    split,
)
from .preconditioned import PreconditionedOptimizer
from .registry import optimizer_class
from .specs import OPTIMIZER_NAMES, unknown_name
from .transport import InPlace, Replicated, RowSharded, is_sharded_by_rows, local


class ShardedOptimizer(torch.optim.Optimizer):
    """Gives every rank the state and the work of its share of the parameters; all ranks get all new weights.

    A matrix rule needs a parameter whole: each has one owner, so that all owners have about the same work. What is
    updated element by element is split by rows, evenly. The weights are those of the unsharded optimizer up to
    rounding.

    Parameters are either whole on every rank, with equal gradients, as `DistributedDataParallel` leaves them, or
    sharded by rows by FSDP2 (`torch.distributed.fsdp.fully_shard`), where each rank steps its own rows of what is
    updated element by element. All ranks must have gradients for the same parameters.

    The parameter groups are the wrapped optimizer's own: learning rates and other keywords set there count. Each rank
    has the state of its share alone: `gather_state` and `load_state` take the place of the state dict.

    Args:
        optimizer: one that `build_optimizer` made, with named parameters, before its first step; drop it afterwards.
        group: the process group of all ranks that train the model; all processes by default.

    Raises:
        ValueError: an optimizer that is not of the registry, or that has taken a step; parameters without names, or
            sharded in another way than FSDP2's by rows over the whole group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
        _refuse_unfit(optimizer)
        _refuse_other_sharding(optimizer.param_groups, dist.get_world_size(group))
        self._parts: list[Part] = []
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._process_group = group
        self.native_kernels = bool(getattr(optimizer, "native_kernels", False))
        self._parts = share_out(optimizer, group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients at hand, on all ranks; returns the loss of `closure` where one is given.

        Raises `ValueError` for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_sparse_gradients(self.param_groups)
        for part in self._parts:
            part.transport.begin()
        for part in self._parts:
            part.step()
        for part in self._parts:
            part.transport.finish()
        return loss

    @torch.no_grad()
    def gather_state(self, destination: int = 0) -> WholeState | None:
        """The whole state on rank `destination` of the process group, `None` on the others; all ranks must call it.

        By the name of the parameter and then by key, as the unsharded optimizer has it in `optimizer.state[param]`, in
        host memory of its own; a parameter without state is left out.
        """
        own = {piece: state for part in self._parts for piece, state in part.states().items()}
        pieces = [piece for part in self._parts for piece in part.transport.pieces]
        wire = Wire(self._process_group, local(pieces[0].param).device)
        rank = dist.get_rank(self._process_group)
        if rank == destination:
            return receive_state(pieces, own, wire, rank, dist.get_world_size(self._process_group))
        send_state(own, wire, destination)
        return None

    def load_state(self, whole: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Take this rank's share of a whole state, as `gather_state` or an unsharded optimizer has it.

        Each rank copies its share alone, so the tensors may be mapped from a file. A parameter that is left out has
        no state afterwards. Raises `ValueError` for a name that no parameter has, or state of another shape.
        """
        names = [piece.name for part in self._parts for piece in part.transport.pieces]
        for name in whole:
            if name not in names:
                raise unknown_name("parameter in the state", name, names)
        for part in self._parts:
            part.load(whole)

    def state_dict(self) -> NoReturn:
        """Raises `RuntimeError`: no rank has the whole state; see `gather_state`."""
        raise RuntimeError("no rank has the whole state of a ShardedOptimizer: use gather_state(), on all ranks")

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        """Raises `RuntimeError`; see `load_state`."""
        raise RuntimeError("a ShardedOptimizer loads its share of a whole state: use load_state(), on all ranks")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises `RuntimeError` once the parameters are shared out; add groups to the optimizer before wrapping it."""
        if self._parts:
            raise RuntimeError("the parameters of a ShardedOptimizer are shared out: add groups before wrapping")
        super().add_param_group(param_group)


def _refuse_unfit(optimizer: torch.optim.Optimizer) -> None:
    """`ValueError` unless the optimizer is one whose work can be shared out, with names and without a past."""
    name = type(optimizer).__name__
    if type(optimizer) not in [optimizer_class(known)[0] for known in OPTIMIZER_NAMES]:
        raise ValueError(f"{name} cannot be sharded; these can: {', '.join(OPTIMIZER_NAMES)}")
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"{name} has parameters without names: give it (name, parameter) pairs, or use build_optimizer"
        )
    # Adagrad has a state from the beginning, with a step of 0.
    if any(state.get("step", 1) > 0 for state in optimizer.state.values()):
        raise ValueError(f"{name} has taken a step: wrap it before, and use load_state() to give it a state")


def _refuse_other_sharding(groups: list[Group], size: int) -> None:
    for group in groups:
        for index, param in enumerate(group["params"]):
            if is_dtensor(param) and not is_sharded_by_rows(param, size):
                raise ValueError(
                    f"{describe(group, index)} is not sharded by rows over {size} ranks, but as {param.placements} "
                    f"on {param.device_mesh}"
                )


def _refuse_sparse_gradients(groups: list[Group]) -> None:
    for group in groups:
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.is_sparse:
                raise ValueError(f"ShardedOptimizer cannot use the sparse gradient of {describe(group, index)}")


@dataclass(frozen=True)
class Part:
    """Parameters of one group that take one way; the optimizer of this rank's pieces of them, if it has any."""

    group: Group
    transport: InPlace
    optimizer: torch.optim.Optimizer | None

    def step(self) -> None:
        """Step this rank's pieces, and begin to send their new weights."""
        self.transport.bind()
        if self.optimizer is not None:
            self.optimizer.param_groups[0].update(_settings(self.group))
            self.optimizer.step()
        self.transport.send()

    def states(self) -> dict[Piece, State]:
        """The state of each of this rank's pieces, in the order of the part's pieces."""
        if self.optimizer is None:
            return {}
        return {piece: self.optimizer.state.get(tensor, {}) for piece, tensor in self.transport.own.items()}

    def load(self, whole: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Give this rank's pieces their parts of a whole state."""
        if self.optimizer is not None:
            parts = (part_of_state(whole, piece) for piece in self.transport.own)
            state = {index: part for index, part in enumerate(parts) if part}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def share_out(optimizer: torch.optim.Optimizer, process_group: dist.ProcessGroup | None) -> list[Part]:
    """All parameters in parts; first what needs no roots, so that its weights travel while roots are computed."""
    size = dist.get_world_size(process_group)
    owner = _owners(optimizer, size)

    def pieces(name: str, param: Tensor) -> list[Piece]:
        if param in owner:
            return [Piece(name, param, owner[param])]
        rows = chunked_rows if is_dtensor(param) else even_rows
        return split(name, param, rows(param.shape[0], size))

    parts: list[Part] = []
    for group in sorted(optimizer.param_groups, key=_is_matrix_group):
        ways: dict[tuple[type[InPlace], torch.dtype], list[Piece]] = defaultdict(list)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            ways[_transport(group, param), param.dtype] += pieces(name, param)
        for (transport_class, _), of_one_way in ways.items():
            transport = transport_class(of_one_way, process_group)
            parts.append(Part(group, transport, _inner_optimizer(optimizer, group, transport)))
    return parts


def _owners(optimizer: torch.optim.Optimizer, size: int) -> dict[Tensor, int]:
    """The owner of each parameter that is not split: matrices, and what is small."""
    sides = len(optimizer.factors) if isinstance(optimizer, PreconditionedOptimizer) else 1
    matrices: dict[Tensor, int] = {}
    small: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if _is_matrix_group(group):
                matrices[param] = matrix_cost(param.shape, group, sides)
            elif param.numel() < SPLIT_FROM and not is_dtensor(param):
                small[param] = param.numel()
    return {**owners(matrices, size), **owners(small, size)}


def _transport(group: Group, param: Tensor) -> type[InPlace]:
    if not is_dtensor(param):
        return Replicated
    return RowSharded if _is_matrix_group(group) else InPlace


def _is_matrix_group(group: Group) -> bool:
    return bool(group.get("rule") == "matrix")


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _inner_optimizer(
    optimizer: torch.optim.Optimizer, group: Group, transport: InPlace
) -> torch.optim.Optimizer | None:
    """One like `optimizer` for this rank's pieces of a part of one of its groups."""
    if not transport.own:
        return None
    accepted = inspect.signature(type(optimizer)).parameters
    keywords = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    params = [(piece.name, tensor) for piece, tensor in transport.own.items()]
    return type(optimizer)([{**_settings(group), "params": params}], **keywords)
