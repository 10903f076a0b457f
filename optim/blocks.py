"""The matrices inside parameters: `Block` is one matrix (an expert, some rows, or a whole parameter), `Stack` is blocks
of one shape that are processed as a batch. For the pieces that ranks own, see pieces.py.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Group, Scalar


@dataclass(frozen=True)
class Block:
    """Rows of a parameter that form one matrix; all rows if the parameter is not split."""

    param: Tensor
    rows: tuple[int | slice, ...]
    """Index into the parameter: the position in its batch dimensions, then a slice of rows."""
    suffix: str
    """Suffix of this block's keys in the parameter's state; empty if the parameter is not split."""

    def key(self, name: str) -> str:
        """Return the key of this block's state `name` in the parameter's state."""
        return f"{name}{self.suffix}"

    def of(self, tensor: Tensor) -> Tensor:
        """Return this block of a tensor of the parameter's shape as a matrix (p, q), `p ≤ q`; see `is_transposed`."""
        matrix = tensor[self.rows].flatten(1)
        return matrix.mT if self.is_transposed else matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, before the transposition of `of`."""
        rows, *others = self.param[self.rows].shape
        return rows, torch.Size(others).numel()

    @property
    def is_transposed(self) -> bool:
        """Whether `of` transposes, so that tall and wide matrices stack. A square matrix is transposed too."""
        rows, columns = self.shape
        return rows >= columns


def blocks_of(param: Tensor, group: Group) -> list[Block]:
    """Return the blocks of a parameter of shape (*batch, rows, ...), by `batch_dims` and `row_blocks` of its group."""
    batch, rows = param.shape[: group["batch_dims"]], param.shape[group["batch_dims"]]
    sizes = block_sizes(rows, group["row_blocks"])
    ends = list(itertools.accumulate(sizes))
    blocks = []
    for index in itertools.product(*map(range, batch)):
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            position = index if group["row_blocks"] is None else (*index, number)
            blocks.append(Block(param, (*index, slice(end - size, end)), "".join(f".{each}" for each in position)))
    return blocks


def block_sizes(rows: int, row_blocks: int | Sequence[int] | None) -> list[int]:
    """Return the rows of each block. `row_blocks`: number of equal blocks, rows of each, or None for one block."""
    if row_blocks is None:
        return [rows]
    if isinstance(row_blocks, Sequence):
        return list(row_blocks)
    return [rows // row_blocks] * row_blocks


@dataclass(frozen=True)
class Stack:
    """Blocks of one shape (up to transposition), dtype and device; entry `i` of a batch belongs to block `i`."""

    blocks: list[Block]

    def of(self, tensors: dict[Tensor, Tensor]) -> Tensor:
        """Stack the blocks' matrices, shape (k, p, q) with `p ≤ q`; `tensors` has a tensor for each parameter."""
        return torch.stack([block.of(tensors[block.param]) for block in self.blocks])

    def store(self, matrices: Tensor, tensors: dict[Tensor, Tensor]) -> None:
        """Write matrices (k, p, q) to the tensors that `of` reads."""
        views = [tensors[block.param][block.rows] for block in self.blocks]
        torch._foreach_copy_(views, self._as_rows(matrices, views))

    def subtract(self, updates: Tensor, lr: Scalar, weight_decay: float) -> None:
        """Apply `W ← (1 − lr · weight_decay) W − lr · U`; `updates` (k, p, q) is overwritten.

        Weights of lower precision are rounded once.
        """
        views = [block.param[block.rows] for block in self.blocks]
        weights = [view.to(updates.dtype) for view in views]
        if weight_decay != 0:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, self._as_rows(updates.mul_(lr), views))
        if weights[0] is not views[0]:
            torch._foreach_copy_(views, weights)

    def _as_rows(self, matrices: Tensor, views: list[Tensor]) -> list[Tensor]:
        """Reshape the matrices to the shape of their rows in the parameters."""
        return [
            (matrix.mT if block.is_transposed else matrix).reshape(view.shape)
            for block, matrix, view in zip(self.blocks, matrices, views, strict=True)
        ]


def stacks_of(blocks: Sequence[Block]) -> list[Stack]:
    """Group blocks by shape (up to transposition), dtype and device, in order of appearance."""
    stacks: dict[object, list[Block]] = defaultdict(list)
    for block in blocks:
        stacks[tuple(sorted(block.shape)), block.param.dtype, block.param.device].append(block)
    return [Stack(blocks) for blocks in stacks.values()]
