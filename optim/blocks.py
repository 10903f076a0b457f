"""The matrices inside parameters: blocks of rows, and stacks of those that have one shape."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Scalar


@dataclass(frozen=True)
class Block:
    """Some rows of a parameter that are a matrix of their own; all of them where the parameter is not split."""

    param: Tensor
    rows: slice
    suffix: str
    """Ends this block's keys in the parameter's state; empty where the parameter is not split."""

    def key(self, name: str) -> str:
        """The key in the parameter's state of what is this block's own."""
        return f"{name}{self.suffix}"

    def of(self, tensor: Tensor) -> Tensor:
        """Its matrix in a tensor of the parameter's shape: later dimensions flattened, the shorter side first."""
        matrix = tensor[self.rows].flatten(1)
        return matrix.mT if self.is_transposed else matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns as they lie in the parameter."""
        rows, *others = self.param[self.rows].shape
        return rows, torch.Size(others).numel()

    @property
    def is_transposed(self) -> bool:
        """Whether `of` transposes: so tall matrices stack with wide ones, and a square one counts as tall."""
        rows, columns = self.shape
        return rows >= columns


def blocks_of(param: Tensor, row_blocks: int | Sequence[int] | None) -> list[Block]:
    """The blocks of a parameter; `row_blocks` counts equal ones or gives the rows of each."""
    if row_blocks is None:
        return [Block(param, slice(0, param.shape[0]), "")]
    sizes = block_sizes(param.shape[0], row_blocks)
    ends = list(itertools.accumulate(sizes))
    return [
        Block(param, slice(end - size, end), f".{index}")
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def block_sizes(rows: int, row_blocks: int | Sequence[int]) -> list[int]:
    """The rows of each block, where `row_blocks` counts equal blocks or is the answer."""
    if isinstance(row_blocks, Sequence):
        return list(row_blocks)
    return [rows // row_blocks] * row_blocks


@dataclass(frozen=True)
class Stack:
    """Blocks of one shape, precision and device, in the order of the stacks' first dimension."""

    blocks: list[Block]

    def of(self, tensors: dict[Tensor, Tensor]) -> Tensor:
        """The blocks' matrices in tensors a parameter, shape (k, p, q) with `p ≤ q`."""
        return torch.stack([block.of(tensors[block.param]) for block in self.blocks])

    def store(self, matrices: Tensor, tensors: dict[Tensor, Tensor]) -> None:
        """Write a stack (k, p, q) back to where `of` read it."""
        views = [tensors[block.param][block.rows] for block in self.blocks]
        torch._foreach_copy_(views, self._as_rows(matrices, views))

    def subtract(self, updates: Tensor, lr: Scalar, weight_decay: float) -> None:
        """`W ← (1 − lr · weight_decay) W − lr · U`, `updates` (k, p, q); a lower precision is rounded once."""
        views = [block.param[block.rows] for block in self.blocks]
        weights = [view.to(updates.dtype) for view in views]
        if weight_decay != 0:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(weights, self._as_rows(updates.mul_(lr), views))
        if weights[0] is not views[0]:
            torch._foreach_copy_(views, weights)

    def _as_rows(self, matrices: Tensor, views: list[Tensor]) -> list[Tensor]:
        """A stack's matrices as the rows of parameters that they are."""
        return [
            (matrix.mT if block.is_transposed else matrix).reshape(view.shape)
            for block, matrix, view in zip(self.blocks, matrices, views, strict=True)
        ]


def stacks_of(blocks: Sequence[Block]) -> list[Stack]:
    """Blocks in stacks of equal shape, up to transposition, precision and device, in order of appearance."""
    stacks: dict[object, list[Block]] = defaultdict(list)
    for block in blocks:
        stacks[tuple(sorted(block.shape)), block.param.dtype, block.param.device].append(block)
    return [Stack(blocks) for blocks in stacks.values()]
