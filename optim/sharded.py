"""`ShardedOptimizer`: shards the state and the work of an optimizer over the ranks of a process group."""

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
    piece_state,
    receive_state,
    send_state,
    split,
)
from .preconditioned import PreconditionedOptimizer
from .registry import optimizer_class
from .specs import OPTIMIZER_NAMES, unknown_name
from .transport import InPlace, Replicated, RowSharded, is_sharded_by_rows, local


class ShardedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer: each rank keeps the state of its pieces and steps them, then all ranks get the new weights.

    The matrix rule needs whole parameters: each has one owner, chosen to balance the work. Parameters with elementwise
    updates are split evenly by rows. The weights equal those of the unsharded optimizer up to rounding.

    Parameters are either replicated with equal gradients, as under `DistributedDataParallel`, or sharded by rows by
    FSDP2 (`torch.distributed.fsdp.fully_shard`), where each rank steps its own rows of elementwise updates. All ranks
    must have gradients for the same parameters.

    The parameter groups are those of the wrapped optimizer: learning rates and other keywords set there take effect.
    No rank has the whole state: use `gather_state` and `load_state` instead of the state dict.

    Args:
        optimizer: a new optimizer from `build_optimizer`, with named parameters; do not use it afterwards.
        group: process group of all ranks that train the model; the default group if None.

    Raises:
        ValueError: the optimizer is not in the registry or has taken a step, a parameter has no name, or a parameter
            is sharded differently from FSDP2's sharding by rows over the whole group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
        _refuse_unfit(optimizer)
        _refuse_other_sharding(optimizer.param_groups, dist.get_world_size(group))
        self._piece_groups: list[PieceGroup] = []
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._process_group = group
        self.native_kernels = bool(getattr(optimizer, "native_kernels", False))
        self._piece_groups = assign_pieces(optimizer, group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; returns the loss of `closure` if one is given. All ranks must call it.

        Raises `ValueError` for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_sparse_gradients(self.param_groups)
        for piece_group in self._piece_groups:
            piece_group.transport.begin()
        for piece_group in self._piece_groups:
            piece_group.step()
        for piece_group in self._piece_groups:
            piece_group.transport.finish()
        return loss

    @torch.no_grad()
    def gather_state(self, destination: int = 0) -> WholeState | None:
        """Return the whole state on rank `destination` of the process group, None on others; all ranks must call it.

        The state is a dict by parameter name, then by key as in `optimizer.state[param]`, with new CPU tensors.
        Parameters without state are omitted.
        """
        own = {piece: state for piece_group in self._piece_groups for piece, state in piece_group.states().items()}
        pieces = [piece for piece_group in self._piece_groups for piece in piece_group.transport.pieces]
        wire = Wire(self._process_group, local(pieces[0].param).device)
        rank = dist.get_rank(self._process_group)
        if rank == destination:
            return receive_state(pieces, own, wire, rank, dist.get_world_size(self._process_group))
        send_state(own, wire, destination)
        return None

    def load_state(self, whole: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Load this rank's pieces of a whole state, in the format of `gather_state`.

        Each rank copies only its own pieces, so the tensors may be mapped from a file. A parameter that is missing has
        no state afterwards. Raises `ValueError` for an unknown parameter name or a wrong shape.
        """
        names = [piece.name for piece_group in self._piece_groups for piece in piece_group.transport.pieces]
        for name in whole:
            if name not in names:
                raise unknown_name("parameter in the state", name, names)
        for piece_group in self._piece_groups:
            piece_group.load(whole)

    def state_dict(self) -> NoReturn:
        """Raise `RuntimeError`: no rank has the whole state; see `gather_state`."""
        raise RuntimeError("no rank has the whole state of a ShardedOptimizer: use gather_state(), on all ranks")

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        """Raise `RuntimeError`; see `load_state`."""
        raise RuntimeError("a ShardedOptimizer loads its pieces of a whole state: use load_state(), on all ranks")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise `RuntimeError` after construction; add groups to the optimizer before wrapping it."""
        if self._piece_groups:  # the base constructor also calls this method, before there are any
            raise RuntimeError("the parameters of a ShardedOptimizer already have owners: add groups before wrapping")
        super().add_param_group(param_group)


def _refuse_unfit(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` unless the optimizer can be sharded, has parameter names, and has not taken a step."""
    name = type(optimizer).__name__
    if type(optimizer) not in [optimizer_class(known)[0] for known in OPTIMIZER_NAMES]:
        raise ValueError(f"{name} cannot be sharded; these can: {', '.join(OPTIMIZER_NAMES)}")
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"{name} has parameters without names: give it (name, parameter) pairs, or use build_optimizer"
        )
    # Adagrad creates its state in the constructor, with a step of 0.
    if any(state.get("step", 1) > 0 for state in optimizer.state.values()):
        raise ValueError(f"{name} has taken a step: wrap a new optimizer, and load the state with load_state()")


def _refuse_other_sharding(groups: list[Group], size: int) -> None:
    for group in groups:
        for index, param in enumerate(group["params"]):
            if is_dtensor(param) and not is_sharded_by_rows(param, size):
                raise ValueError(
                    f"{describe(group, index)} must be sharded by rows over {size} ranks; it is {param.placements} "
                    f"on {param.device_mesh}"
                )


def _refuse_sparse_gradients(groups: list[Group]) -> None:
    for group in groups:
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.is_sparse:
                raise ValueError(f"ShardedOptimizer cannot use the sparse gradient of {describe(group, index)}")


@dataclass(frozen=True)
class PieceGroup:
    """Pieces of one parameter group, transport and dtype, and the inner optimizer of this rank's pieces."""

    group: Group
    transport: InPlace
    optimizer: torch.optim.Optimizer | None
    """None if this rank owns no piece of it."""

    def step(self) -> None:
        """Step this rank's pieces, and start sending their new weights."""
        self.transport.bind()
        if self.optimizer is not None:
            self.optimizer.param_groups[0].update(_settings(self.group))
            self.optimizer.step()
        self.transport.send()

    def states(self) -> dict[Piece, State]:
        """Return the state of each of this rank's pieces, in the order of `transport.pieces`."""
        if self.optimizer is None:
            return {}
        return {piece: self.optimizer.state.get(tensor, {}) for piece, tensor in self.transport.own.items()}

    def load(self, whole: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Load this rank's pieces of a whole state."""
        if self.optimizer is not None:
            states = (piece_state(whole, piece) for piece in self.transport.own)
            state = {index: entries for index, entries in enumerate(states) if entries}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def assign_pieces(optimizer: torch.optim.Optimizer, process_group: dist.ProcessGroup | None) -> list[PieceGroup]:
    """Split all parameters into pieces with owners.

    Groups without inverse roots come first: their weights are sent while the roots are computed.
    """
    size = dist.get_world_size(process_group)
    owner = _owners(optimizer, size)

    def pieces(name: str, param: Tensor) -> list[Piece]:
        if param in owner:
            return [Piece(name, param, owner[param])]
        rows = chunked_rows if is_dtensor(param) else even_rows
        return split(name, param, rows(param.shape[0], size))

    piece_groups: list[PieceGroup] = []
    for group in sorted(optimizer.param_groups, key=_is_matrix_group):
        alike: dict[tuple[type[InPlace], torch.dtype], list[Piece]] = defaultdict(list)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            alike[_transport(group, param), param.dtype] += pieces(name, param)
        for (transport_class, _), own in alike.items():
            transport = transport_class(own, process_group)
            piece_groups.append(PieceGroup(group, transport, _inner_optimizer(optimizer, group, transport)))
    return piece_groups


def _owners(optimizer: torch.optim.Optimizer, size: int) -> dict[Tensor, int]:
    """Return the owner of each parameter that is not split: matrices, and small parameters."""
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
    """Return an optimizer with the settings of `optimizer` and `group` for this rank's pieces; None without pieces."""
    if not transport.own:
        return None
    accepted = inspect.signature(type(optimizer)).parameters
    keywords = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    params = [(piece.name, tensor) for piece, tensor in transport.own.items()]
    return type(optimizer)([{**_settings(group), "params": params}], **keywords)
