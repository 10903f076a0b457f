"""DASGO: the diagonal form of ASGO, with one number per column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import native
from .base import Group, Scalar, State, can_be_read, gradient, on_host
from .blocks import blocks_of
from .matrix_optimizer import UPDATE_RMS, MatrixOptimizer, of_one_kind


def dasgo_factors(
    grad_squares: Sequence[Tensor],
    momentum_squares: Sequence[Tensor],
    column_rms: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Update `√v` of each matrix in place; returns the factors, shape (n,), that turn momentum columns into the update.

    The squares are sums over the rows, in float64 if the device supports it. The factors have the same dtype: with tiny
    momenta they exceed the range of float32. `sizes` are the numbers of elements.
    """
    lengths = [squares.numel() for squares in grad_squares]
    squares = torch.cat(list(grad_squares))
    # Not `lerp`: it turns an infinite state into NaN.
    v = (
        torch.cat([rms.flatten() for rms in column_rms])
        .to(squares.dtype)
        .square_()
        .mul_(beta2)
        .add_(squares, alpha=1 - beta2)
    )
    # The norm of a column can exceed the range of float32 even if no entry does.
    torch._foreach_copy_(list(column_rms), list(torch.split(_within(column_rms[0].dtype, v.sqrt()), lengths)))
    inverse = torch.where(v + eps > 0, (v + eps).rsqrt(), 0.0)
    norms = torch.stack(torch._foreach_norm(torch.split(torch.cat(list(momentum_squares)).sqrt_() * inverse, lengths)))
    to_unit = torch.where(norms > 0, 1 / norms, 0.0)
    factors = [columns * unit for columns, unit in zip(torch.split(inverse, lengths), to_unit, strict=True)]
    torch._foreach_mul_(factors, [UPDATE_RMS * math.sqrt(size) for size in sizes])
    return factors


def _within(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Convert to a dtype, and clamp to its range."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def column_squares(matrix: Tensor) -> Tensor:
    """Sum the squares over the first dimension, and flatten; in float64, where squares of float32 cannot overflow."""
    if matrix.device.type == "mps":  # does not support float64
        return matrix.square().sum(0).flatten()
    if can_be_read(matrix):
        squares = matrix.square().sum(0)
        if 1e-20 < squares.max() < 1e30:  # several times faster, and as accurate in this range
            return squares.double().flatten()
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)
    return norms.square().flatten()


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
        sums = native.dasgo_moments(grads, momenta, 1 - group["momentum"])
    else:
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        sums = [(column_squares(grad), column_squares(momentum)) for grad, momentum in zip(grads, momenta, strict=True)]
    grad_squares, momentum_squares = zip(*sums, strict=True)
    factors = dasgo_factors(grad_squares, momentum_squares, column_rms, sizes, beta2=group["beta2"], eps=group["eps"])
    # Clamp: an infinite factor times a zero entry would be NaN.
    steps = [_within(rms.dtype, factor.mul_(-lr)) for factor, rms in zip(factors, column_rms, strict=True)]
    if is_native:
        native.dasgo_step(weights, momenta, steps, keep)
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


def _step(weights: list[Tensor], momenta: list[Tensor], steps: list[Tensor], keep: Scalar) -> None:
    """`W ← keep · W + M diag(steps)`, rounded once if a weight has a lower precision than its momentum."""
    wide = [weight.to(momentum.dtype) for weight, momentum in zip(weights, momenta, strict=True)]
    torch._foreach_mul_(wide, keep)
    for weight, momentum, step in zip(wide, momenta, steps, strict=True):
        weight.addcmul_(momentum, step.view(momentum.shape[1:]))
    if wide[0] is not weights[0]:
        torch._foreach_copy_(weights, wide)
