"""The matrices inside parameters: experts, blocks of rows, and stacks of those that have one shape."""

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
    """Some rows of a parameter that are a matrix of their own; all of them where the parameter is not split."""

    param: Tensor
    rows: tuple[int | slice, ...]
    """An index of the parameter: the position in its batch dimensions, then a slice of rows."""
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


def blocks_of(param: Tensor, group: Group) -> list[Block]:
    """The blocks of a parameter of shape (*batch, rows, ...), with as many batch dimensions as `group` says."""
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
    """The rows of each block, where `row_blocks` counts equal blocks or is the answer; `None`: all rows are one."""
    if row_blocks is None:
        return [rows]
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
