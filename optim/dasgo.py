"""DASGO: the diagonal form of ASGO, with one number per column."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import native
from .base import Group, Scalar, State, can_be_read, gradient, on_host
from .blocks import blocks_of
from .matrix_optimizer import UPDATE_RMS, MatrixOptimizer, of_one_kind

STACKED = 2**20
"""Largest number of elements of a matrix that a GPU processes in a copied stack. A larger one needs longer to copy than
the host needs to launch its operations."""

_STACK = 2**25
"""Largest number of elements of such a stack: 128 MiB."""


def dasgo_factors(
    grad_squares: Tensor,
    momentum_squares: Tensor,
    column_rms: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    beta2: float,
    eps: float,
) -> Tensor:
    """Update `√v` of each matrix in place; returns the factors, (N,), that turn momentum columns into the update.

    N counts the columns of all matrices; matrices with as many columns should follow each other. The squares are sums
    over the rows, (N,), in float64 if the device supports it. The factors have the same dtype: with tiny momenta they
    exceed the range of float32. `sizes` are the numbers of elements.
    """
    lengths = [rms.numel() for rms in column_rms]
    # Not `lerp`: it turns an infinite state into NaN.
    v = (
        torch.cat([rms.flatten() for rms in column_rms])
        .to(grad_squares.dtype)
        .square_()
        .mul_(beta2)
        .add_(grad_squares, alpha=1 - beta2)
    )
    # The norm of a column can exceed the range of float32 even if no entry does.
    torch._foreach_copy_(list(column_rms), list(torch.split(_within(column_rms[0].dtype, v.sqrt()), lengths)))
    inverse = torch.where(v + eps > 0, (v + eps).rsqrt(), 0.0)
    shapes = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths)]
    parts = zip(shapes, _split(inverse, shapes), _split(momentum_squares.sqrt(), shapes), strict=True)
    factors = torch.cat([_to_unit(part.view(shape), norms.view(shape)) for shape, part, norms in parts])
    torch._foreach_mul_(list(torch.split(factors, lengths)), [UPDATE_RMS * math.sqrt(size) for size in sizes])
    return factors


def _split(values: Tensor, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    """Split a vector into parts with as many elements as tensors of these shapes."""
    return torch.split(values, [math.prod(shape) for shape in shapes])


def _to_unit(inverse: Tensor, column_norms: Tensor) -> Tensor:
    """Return the factors, flattened, that give updates of norm 1; from those before and norms of columns, (k, n)."""
    norms = torch.linalg.vector_norm(column_norms * inverse, dim=1, keepdim=True)
    return (inverse * torch.where(norms > 0, 1 / norms, 0.0)).flatten()


def _within(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Convert to a dtype, and clamp to its range."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def column_squares(matrices: Sequence[Tensor]) -> Tensor:
    """Sum the squares over the first dimension of each matrix; returns those of all columns, (N,).

    In float64, where squares of float32 cannot overflow.
    """
    if matrices[0].device.type == "mps":  # does not support float64
        return torch.cat([matrix.square().sum(0).flatten() for matrix in matrices])
    if can_be_read(matrices[0]):
        return torch.cat([_column_squares_on_cpu(matrix) for matrix in matrices])
    stacks = [torch.stack(alike) if len(alike) > 1 else alike[0][None] for alike in _alike(matrices)]
    norms = [torch.linalg.vector_norm(stack, dim=1, dtype=torch.float64).flatten() for stack in stacks]
    return torch.cat(norms).square_()


def _column_squares_on_cpu(matrix: Tensor) -> Tensor:
    squares = matrix.square().sum(0)
    if 1e-20 < squares.max() < 1e30:  # several times faster, and as accurate in this range
        return squares.double().flatten()
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)
    return norms.square().flatten()


def _alike(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield matrices of equal shape that follow each other, to be processed as a stack; one alone if that is faster.

    A GPU takes microseconds to launch an operation, as long as it takes for a small matrix.
    """
    for shape, equal in itertools.groupby(matrices, lambda matrix: matrix.shape):
        is_small = shape.numel() <= STACKED and not can_be_read(matrices[0])
        most = _STACK // shape.numel() if is_small else 1
        remaining = list(equal)
        yield from (remaining[start : start + most] for start in range(0, len(remaining), most))


class DASGO(MatrixOptimizer):
    """Diagonal ASGO: scales the columns of a matrix by the averaged squares of their gradients.

    At each step, for a gradient `G` of shape (m, n)::

        M ← lerp(M, G, 1 − momentum)
        v ← lerp(v, Σ_rows G², 1 − beta2)
        U ← M / √(v + eps);  U ← U · 0.2 √(m n) / ‖U‖_F
        W ← (1 − lr · weight_decay) W − lr · U

    Source: arXiv 2503.20762, Algorithm 4. State: the momentum, and one number per column.

    Args:
        params: parameters with at least two dimensions (flattened to two), named or not, or parameter groups; groups
            with `rule="adam"` accept any shape.
        lr: learning rate; values for AdamW work, because the RMS of an update is 0.2.
        momentum: decay rate of the averaged gradient.
        beta2: decay rate of the column squares.
        eps: added to the column squares under the root.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count steps on the parameter's device, for use in a CUDA graph.

    Raises:
        ValueError: invalid keyword value, complex parameter, parameter that is not a matrix, or sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "beta2": beta2,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    native_kernels = True

    def block_state(self, shape: tuple[int, int], like: Tensor) -> State:
        """Return zeros (n,) for `√v`; `v` itself would leave the range of float32 for tiny and huge gradients."""
        return {"column_rms": like.new_zeros(shape[1])}

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Apply Algorithm 4 to each block in place."""
        for alike in of_one_kind(params):
            blocks = [block for param in alike for block in blocks_of(param, group)]
            blocks.sort(key=lambda block: (block.shape[1], block.param[block.rows].shape))
            grads = {param: gradient(param, group["maximize"]) for param in alike}
            weights = [block.param[block.rows] for block in blocks]
            gradients = [grads[block.param][block.rows] for block in blocks]
            momenta = [self.state[block.param]["exp_avg"][block.rows] for block in blocks]
            column_rms = [self.state[block.param][block.key("column_rms")] for block in blocks]
            _update(weights, gradients, momenta, column_rms, group)


def _update(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], column_rms: list[Tensor], group: Group
) -> None:
    """Update matrices of one dtype and device. The first three lists hold tensors of the shapes of the blocks."""
    lr, sizes = on_host(group["lr"]), [weight.numel() for weight in weights]
    keep = 1 - lr * group["weight_decay"]
    is_native = _is_native(weights, grads, momenta, column_rms)
    if is_native:
        weights, grads, momenta = ([tensor.flatten(1) for tensor in tensors] for tensors in (weights, grads, momenta))
        moments = native.dasgo_moments(grads, momenta, 1 - group["momentum"])
        grad_squares, momentum_squares = map(torch.cat, zip(*moments, strict=True))
    else:
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        grad_squares, momentum_squares = column_squares(grads), column_squares(momenta)
    factors = dasgo_factors(grad_squares, momentum_squares, column_rms, sizes, beta2=group["beta2"], eps=group["eps"])
    # Clamp: an infinite factor times a zero entry would be NaN.
    steps = _within(column_rms[0].dtype, factors.mul_(-lr))
    if is_native:
        native.dasgo_step(weights, momenta, list(torch.split(steps, [rms.numel() for rms in column_rms])), keep)
    else:
        _step(weights, momenta, steps, keep)


def _is_native(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], column_rms: list[Tensor]) -> bool:
    return (
        sum(weight.numel() for weight in weights) >= native.WORTH_FROM
        and all(native.fits("dasgo", row) for row in zip(weights, grads, momenta, strict=True))
        and all(native.is_bare(rms) for rms in column_rms)
        and native.is_available()
        and native.sees_memory()
    )


def _step(weights: list[Tensor], momenta: list[Tensor], steps: Tensor, keep: Scalar) -> None:
    """`W ← keep · W + M diag(steps)`, rounded once if a weight has a lower precision than its momentum."""
    wide = [weight.to(momentum.dtype) for weight, momentum in zip(weights, momenta, strict=True)]
    torch._foreach_mul_(wide, keep)
    stacks = list(_alike(momenta))
    shapes = [(len(stack), 1, *stack[0].shape[1:]) for stack in stacks]
    targets = iter(wide)
    for stack, shape, factors in zip(stacks, shapes, _split(steps, shapes), strict=True):
        if len(stack) == 1:
            next(targets).addcmul_(stack[0], factors.view(shape[1:]))
        else:
            updates = torch.stack(stack).mul_(factors.view(shape))
            torch._foreach_add_(list(itertools.islice(targets, len(stack))), list(updates))
    if wide[0] is not weights[0]:
        torch._foreach_copy_(weights, wide)
