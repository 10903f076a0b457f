"""The operands of an elementwise update, and their memory layout.

A `Row` is the tuple of tensors of one parameter, not a row of a matrix. A chunk is a part of a row that fits
in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .base import Scalar, is_plain

CHUNK = 2**18
"""Elements that a CPU updates at a time, 8 MiB in all. Half and twice this were slower (32 MiB of L3)."""

JOINED = 2**22
"""Largest number of elements that a GPU updates as one copied vector. A longer row needs no fewer launches."""

Row = Sequence[Tensor]
"""A parameter, its gradient in the dtype of the state, and its state tensors without the step count."""

Update = Callable[..., None]
"""Updates one row in place: `update(weight, grad, *state, **scalars)`, all tensors of equal shape."""


def update_rows(update: Update, rows: Sequence[Row], scalars: dict[str, Scalar]) -> None:
    """Update each row in place. A weight of lower precision than its state is rounded once."""
    for param, grad, *state in rows:
        weight = param.to(grad.dtype)
        update(weight, grad, *state, **scalars)
        if weight is not param:
            param.copy_(weight)


def joined(rows: Sequence[Row]) -> Iterator[AbstractContextManager[Row]]:
    """Yield context managers of rows that hold the elements of several rows; on exit, they copy them back.

    A GPU takes microseconds to launch an operation, and an update has about 20 of them for each row, however short.
    """
    together: list[Row] = []
    for row in rows:
        if row[0].numel() > JOINED or not all(map(is_plain, row)):
            yield nullcontext(row)
            continue
        if sum(other[0].numel() for other in together) + row[0].numel() > JOINED:
            yield _as_one(together)
            together = []
        together.append(row)
    if together:
        yield _as_one(together)


@contextmanager
def _as_one(rows: list[Row]) -> Iterator[Row]:
    if len(rows) == 1:
        yield rows[0]
        return
    columns = [list(column) for column in zip(*rows, strict=True)]
    row = [torch.cat([tensor.reshape(-1) for tensor in column]) for column in columns]
    yield row
    sizes = [param.numel() for param in columns[0]]
    for index, (tensors, values) in enumerate(zip(columns, row, strict=True)):
        if index != 1:  # the gradient
            parts = zip(torch.split(values, sizes), tensors, strict=True)
            torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in parts])


def add_scaled_(target: Tensor, values: Tensor, factor: Scalar) -> Tensor:
    """Compute `target += factor · values`, in one operation if the factor is a number."""
    if isinstance(factor, Tensor):
        return target.add_(values * factor)
    return target.add_(values, alpha=factor)


def as_vectors(row: Row) -> Row:
    """Return 1-D views if weight and state are dense with equal strides; else the row itself."""
    if all(tensor.is_contiguous() for tensor in row):
        return [tensor.view(-1) for tensor in row]
    param, grad, *state = [tensor.permute(_by_stride(row[0])) for tensor in row]
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return row
    return [tensor.view(-1) for tensor in (param, grad.contiguous(), *state)]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory, in any order of the dimensions."""
    return tensor.is_contiguous() or tensor.permute(_by_stride(tensor)).is_contiguous()


def _by_stride(tensor: Tensor) -> list[int]:
    """Return the dimensions in the order of their strides, the largest first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def in_chunks(row: Row) -> Iterator[Row]:
    """Yield the row in chunks that fit in a CPU's cache, if its tensors are 1-D; else the row itself."""
    if row[0].ndim == 1:
        return zip(*[torch.split(tensor, CHUNK) for tensor in row], strict=True)
    return iter([row])
