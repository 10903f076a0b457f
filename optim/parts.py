"""The parameters of an optimizer in parts, each with the optimizer of this rank's pieces and their transport."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Group, State
from .dtensors import is_dtensor
from .piece_state import part_of_state
from .pieces import SPLIT_FROM, Piece, chunked_rows, even_rows, matrix_cost, owners, split
from .preconditioned import PreconditionedOptimizer
from .transport import InPlace, Replicated, RowSharded


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
