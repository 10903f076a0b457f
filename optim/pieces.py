"""Pieces of parameters, which rank of a process group takes which, and their state as that of whole parameters.

The state is gathered on one rank, and taken apart again for any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Group, State
from .blocks import block_sizes

SPLIT_FROM = 2**12
"""Elements from which a parameter that is updated element by element is split; a smaller one has one owner."""

_ROOT_PRODUCTS = 20
"""What an inverse root costs, in products of two matrices of its size: `eigh` 11 on a CPU, `polar_express` 38."""

WholeState = dict[str, State]
"""What an unsharded optimizer has in `optimizer.state[param]`, by the name of the parameter."""

_Description = list[list[tuple[str, str, list[int]]]]
"""Key, dtype and shape of each state tensor of each piece of a rank."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a parameter, or all of it: one rank keeps its state and computes its steps."""

    name: str
    """The parameter's."""
    param: Tensor
    owner: int
    """Rank in the process group."""
    rows: slice | None = None
    """`None` for the whole parameter, which may have no dimension to slice."""

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor that has the parameter's first dimension, as a view."""
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape; the parameter's but for the first dimension."""
        if self.rows is None:
            return tuple(self.param.shape)
        return (self.rows.stop - self.rows.start, *self.param.shape[1:])

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


def even_rows(rows: int, size: int) -> list[slice]:
    """As many slices as ranks, as even as can be, in order; those of fewer rows than ranks are in part empty."""
    return [slice(rows * rank // size, rows * (rank + 1) // size) for rank in range(size)]


def chunked_rows(rows: int, size: int) -> list[slice]:
    """The rows that FSDP2 leaves with each rank: equal chunks, then a shorter one, then empty ones."""
    chunk = -(-rows // size)
    return [slice(min(rows, chunk * rank), min(rows, chunk * (rank + 1))) for rank in range(size)]


def split(name: str, param: Tensor, slices: Sequence[slice]) -> list[Piece]:
    """A piece for each rank that has rows of the parameter."""
    return [Piece(name, param, rank, rows) for rank, rows in enumerate(slices) if rows.stop > rows.start]


def matrix_cost(shape: Sequence[int], group: Group, sides: int) -> int:
    """Multiplications of a step that preconditions each block of each expert on its shorter side, or on both.

    A side `p` of a block (p, q) takes the Gram product, `p p q`, and the root of a matrix (p, p).
    """
    batch_dims = group["batch_dims"]
    rows, columns = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    cost = 0
    for block in block_sizes(rows, group["row_blocks"]):
        for side in sorted((block, columns))[:sides]:
            cost += side * block * columns + _ROOT_PRODUCTS * side**3
    return math.prod(shape[:batch_dims]) * cost


def owners(costs: Mapping[Tensor, int], size: int) -> dict[Tensor, int]:
    """An owner for each parameter: the costliest first, each to the rank that has least to do, or least to keep.

    Depends on the costs and their order alone, so all ranks come to the same answer.
    """
    loads = [(0, 0)] * size
    owner: dict[Tensor, int] = {}
    for param in sorted(costs, key=lambda param: costs[param], reverse=True):
        rank = min(range(size), key=lambda rank: loads[rank])
        cost, elements = loads[rank]
        loads[rank] = (cost + costs[param], elements + param.numel())
        owner[param] = rank
    return owner


class Wire:
    """Sends tensors between two ranks of a process group, over a device that its backend knows."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device

    def send(self, tensor: Tensor, destination: int) -> None:
        """Returns when the tensor is sent, or its sending queued on a GPU."""
        dist.send(tensor.to(self._device).contiguous(), group=self._group, group_dst=destination)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """The next tensor from a rank, which must have this shape and dtype."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, group=self._group, group_src=source)
        return tensor


def send_state(own: Mapping[Piece, State], wire: Wire, destination: int) -> None:
    """Send the state of this rank's pieces, in their order: first what there is, then tensor by tensor."""
    described = json.dumps(_describe(own)).encode()
    wire.send(torch.tensor(len(described), device="cpu"), destination)
    wire.send(torch.frombuffer(bytearray(described), dtype=torch.uint8), destination)
    for state in own.values():
        for tensor in state.values():
            wire.send(tensor, destination)


def receive_state(pieces: Sequence[Piece], own: Mapping[Piece, State], wire: Wire, rank: int, size: int) -> WholeState:
    """Join the state of all pieces, in host memory that nothing else uses."""
    descriptions: dict[int, Iterator[Any]] = {
        source: iter(_describe(own) if source == rank else _receive_description(wire, source)) for source in range(size)
    }
    whole: WholeState = {}
    for piece in pieces:
        for key, dtype, shape in next(descriptions[piece.owner]):
            is_here = piece.owner == rank
            value = own[piece][key] if is_here else wire.receive(shape, getattr(torch, dtype), piece.owner)
            _join(whole.setdefault(piece.name, {}), piece, key, value)
    return whole


def part_of_state(whole: Mapping[str, Mapping[str, Tensor | float]], piece: Piece) -> dict[str, Any]:
    """A piece's own copy of its part of a whole state; `ValueError` where the shapes are not the parameter's."""
    return {key: _part(piece, key, value) for key, value in whole.get(piece.name, {}).items()}


def _describe(own: Mapping[Piece, State]) -> _Description:
    return [
        [(key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for key, tensor in state.items()]
        for state in own.values()
    ]


def _receive_description(wire: Wire, source: int) -> _Description:
    length = int(wire.receive((), torch.int64, source))
    described: _Description = json.loads(bytes(wire.receive((length,), torch.uint8, source).tolist()))
    return described


def _join(entries: State, piece: Piece, key: str, value: Tensor) -> None:
    is_part = piece.rows is not None and value.ndim > 0
    if key not in entries:
        entries[key] = torch.empty(piece.param.shape if is_part else value.shape, dtype=value.dtype, device="cpu")
    (piece.of(entries[key]) if is_part else entries[key]).copy_(value)


def _part(piece: Piece, key: str, value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    if piece.rows is None or value.ndim == 0:
        return value.clone()  # PyTorch's own optimizers would work on the tensor given to them, perhaps a mapped file
    if value.shape != piece.param.shape:
        shapes = f"{tuple(value.shape)} there, {tuple(piece.param.shape)} here"
        raise ValueError(f"the state {key!r} of parameter {piece.name!r} is of another shape: {shapes}")
    return piece.of(value).clone()
