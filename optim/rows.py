"""The rows of tensors that an element-by-element update takes, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .base import Scalar

PIECE = 2**18
"""Elements that a CPU updates at a time, 8 MiB in all: pieces of half or twice this were slower (32 MiB of L3)."""

Row = Sequence[Tensor]
"""A parameter, its gradient in the precision of the state, and its state without the count of steps."""

Update = Callable[..., None]
"""Moves one row by a step, in place: `update(weight, grad, *state, **scalars)`, all tensors of equal shape."""


def update_rows(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> None:
    """Update each row; a weight of lower precision than its state is rounded once."""
    for param, grad, *state in rows:
        weight = param.to(grad.dtype)
        update(weight, grad, *state, **scalars)
        if weight is not param:
            param.copy_(weight)


def add_scaled_(target: Tensor, values: Tensor, factor: Scalar) -> Tensor:
    """`target + factor · values`, in place, in one operation where the factor is a number."""
    if isinstance(factor, Tensor):
        return target.add_(values * factor)
    return target.add_(values, alpha=factor)


def as_vectors(row: Row) -> Row:
    """The same memory as vectors, where weight and state are dense and laid out alike; else the row itself."""
    if all(tensor.is_contiguous() for tensor in row):
        return [tensor.view(-1) for tensor in row]
    param, grad, *state = [tensor.permute(_by_stride(row[0])) for tensor in row]
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return row
    return [tensor.view(-1) for tensor in (param, grad.contiguous(), *state)]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    return tensor.is_contiguous() or tensor.permute(_by_stride(tensor)).is_contiguous()


def _by_stride(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the outermost first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def in_pieces(row: Row) -> Iterator[Row]:
    """The row in pieces that stay in a CPU's cache, where its tensors are vectors."""
    if row[0].ndim == 1:
        return zip(*[torch.split(tensor, PIECE) for tensor in row], strict=True)
    return iter([row])
