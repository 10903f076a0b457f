"""Pieces of parameters for `ShardedOptimizer`: their owners, and conversion of their state from and to whole states.

A piece is the unit of ownership: some rows of a parameter, or all of it, stepped by one rank. A block (blocks.py) is
the unit of the matrix rule. Whole states are gathered on one rank, and split again for any number of ranks.
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
"""Smallest number of elements of a parameter that elementwise updates split; a smaller one has one owner."""

_ROOT_PRODUCTS = 20
"""Assumed cost of an inverse root, in matrix products of its size: `eigh` takes 11 on a CPU, `polar_express` 38."""

WholeState = dict[str, State]
"""`optimizer.state[param]` of an unsharded optimizer, by parameter name."""

_Description = list[list[tuple[str, str, list[int]]]]
"""Key, dtype and shape of each state tensor, for each piece of a rank."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a parameter, or all of it. One rank keeps its state and computes its steps."""

    name: str
    """Name of the parameter."""
    param: Tensor
    owner: int
    """Rank in the process group."""
    rows: slice | None = None
    """None for the whole parameter, which may be 0-dimensional."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece's rows of a tensor with the parameter's first dimension, as a view."""
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece: that of the parameter, except for the first dimension."""
        if self.rows is None:
            return tuple(self.param.shape)
        return (self.rows.stop - self.rows.start, *self.param.shape[1:])

    @property
    def numel(self) -> int:
        """Number of elements of the piece."""
        return math.prod(self.shape)


def even_rows(rows: int, size: int) -> list[slice]:
    """Divide rows evenly among `size` ranks, in order. With fewer rows than ranks, some slices are empty."""
    return [slice(rows * rank // size, rows * (rank + 1) // size) for rank in range(size)]


def chunked_rows(rows: int, size: int) -> list[slice]:
    """Return the rows of each rank as FSDP2 shards them: equal chunks, then a shorter one, then empty ones."""
    chunk = -(-rows // size)
    return [slice(min(rows, chunk * rank), min(rows, chunk * (rank + 1))) for rank in range(size)]


def split(name: str, param: Tensor, slices: Sequence[slice]) -> list[Piece]:
    """Return one piece for each rank that has rows of the parameter."""
    return [Piece(name, param, rank, rows) for rank, rows in enumerate(slices) if rows.stop > rows.start]


def matrix_cost(shape: Sequence[int], group: Group, sides: int) -> int:
    """Return the approximate number of multiplications of a matrix step on a parameter, over all experts and blocks.

    `sides` is 1 or 2. Side `p` of a block (p, q) costs the Gram product, `p p q`, and the root of a matrix (p, p).
    """
    batch_dims = group["batch_dims"]
    rows, columns = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    cost = 0
    for block in block_sizes(rows, group["row_blocks"]):
        for side in sorted((block, columns))[:sides]:
            cost += side * block * columns + _ROOT_PRODUCTS * side**3
    return math.prod(shape[:batch_dims]) * cost


def owners(costs: Mapping[Tensor, int], size: int) -> dict[Tensor, int]:
    """Assign each parameter to a rank, most expensive first, to the rank with the least cost (ties: fewest elements).

    Depends only on the costs and their order, so all ranks compute the same result.
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
    """Point-to-point transfers between ranks, through a device that the backend of the process group supports."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device

    def send(self, tensor: Tensor, destination: int) -> None:
        """Send a tensor; returns when it is sent or, on a GPU, enqueued."""
        dist.send(tensor.to(self._device).contiguous(), group=self._group, group_dst=destination)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """Receive the next tensor from a rank, which must send this shape and dtype."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, group=self._group, group_src=source)
        return tensor


def send_state(own: Mapping[Piece, State], wire: Wire, destination: int) -> None:
    """Send the state of this rank's pieces in order: first keys, dtypes and shapes, then each tensor."""
    description = json.dumps(_describe(own)).encode()
    wire.send(torch.tensor(len(description), device="cpu"), destination)
    wire.send(torch.frombuffer(bytearray(description), dtype=torch.uint8), destination)
    for state in own.values():
        for tensor in state.values():
            wire.send(tensor, destination)


def receive_state(pieces: Sequence[Piece], own: Mapping[Piece, State], wire: Wire, rank: int, size: int) -> WholeState:
    """Receive and join the state of all pieces, as new CPU tensors."""
    descriptions: dict[int, Iterator[Any]] = {
        source: iter(_describe(own) if source == rank else _receive_description(wire, source)) for source in range(size)
    }
    whole: WholeState = {}
    for piece in pieces:
        for key, dtype, shape in next(descriptions[piece.owner]):
            is_here = piece.owner == rank
            value = own[piece][key] if is_here else wire.receive(shape, getattr(torch, dtype), piece.owner)
            _store(whole.setdefault(piece.name, {}), piece, key, value)
    return whole


def piece_state(whole: Mapping[str, Mapping[str, Tensor | float]], piece: Piece) -> dict[str, Any]:
    """Return a copy of a piece's rows of a whole state. Raises `ValueError` if the shapes are not the parameter's."""
    return {key: _piece_value(piece, key, value) for key, value in whole.get(piece.name, {}).items()}


def _describe(own: Mapping[Piece, State]) -> _Description:
    return [
        [(key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for key, tensor in state.items()]
        for state in own.values()
    ]


def _receive_description(wire: Wire, source: int) -> _Description:
    length = int(wire.receive((), torch.int64, source))
    description: _Description = json.loads(bytes(wire.receive((length,), torch.uint8, source).tolist()))
    return description


def _store(entries: State, piece: Piece, key: str, value: Tensor) -> None:
    is_split = piece.rows is not None and value.ndim > 0
    if key not in entries:
        entries[key] = torch.empty(piece.param.shape if is_split else value.shape, dtype=value.dtype, device="cpu")
    (piece.of(entries[key]) if is_split else entries[key]).copy_(value)


def _piece_value(piece: Piece, key: str, value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    if piece.rows is None or value.ndim == 0:
        return value.clone()  # optimizers update this tensor in place, and it may be mapped from a file
    if value.shape != piece.param.shape:
        shapes = f"{tuple(value.shape)}; the parameter has {tuple(piece.param.shape)}"
        raise ValueError(f"the state {key!r} of parameter {piece.name!r} has shape {shapes}")
    return piece.of(value).clone()
