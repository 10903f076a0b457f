"""Pieces of parameters, and which rank of a process group takes which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Group
from .blocks import block_sizes

SPLIT_FROM = 2**12
"""Elements from which a parameter that is updated element by element is split; a smaller one has one owner."""

_ROOT_PRODUCTS = 20
"""What an inverse root costs, in products of two matrices of its size: `eigh` 11 on a CPU, `polar_express` 38."""


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
