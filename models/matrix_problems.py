"""Test problems with matrix parameters, for comparing matrix optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Instance(NamedTuple):
    """A problem drawn from a seed: the initial matrices, in float64, and the loss function.

    `loss` takes one tensor `(..., m, n)` for each matrix of `start`, and returns the losses `(...)`. The minimum is 0.
    """

    start: tuple[Tensor, ...]
    loss: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class MatrixProblem:
    """A matrix problem and its default number of steps; `make` draws an instance from a seed."""

    name: str
    title: str
    formula: str
    steps: int
    make: Callable[[int], Instance]


# Condition number of A and of B; that of the Hessian is their product, 1000.
_CONDITION = 1000**0.5


def _kronecker_quadratic(seed: int) -> Instance:
    """Draw `½ tr((W − W*)ᵀ A (W − W*) B)`.

    For the stacked columns of W, the Hessian is the Kronecker product of B and A. W is 24 × 40 and starts at 0, the
    entries of W* are standard normal, and the eigenvalues of A and of B are evenly spaced in logarithm from the inverse
    of their condition number to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (_positive_definite(size, generator) for size in (24, 40))
    goal = _normal((24, 40), generator)

    def loss(matrices: Sequence[Tensor]) -> Tensor:
        (weight,) = matrices
        gap = weight - goal
        losses: Tensor = (gap * (left @ gap @ right)).sum((-2, -1)) / 2
        return losses

    return Instance((torch.zeros_like(goal),), loss)


def _matrix_factorization(seed: int) -> Instance:
    """Draw `½ ‖U Vᵀ − M‖²`.

    M is 48 × 32 of rank 6, with singular values evenly spaced in logarithm from 4 to 40. U, 48 × 6, and V, 32 × 6,
    start with normal entries of standard deviation 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(_normal((size, 6), generator))[0] for size in (48, 32))
    goal = left * (4 * torch.logspace(0, 1, 6, dtype=torch.float64)) @ right.mT

    def loss(matrices: Sequence[Tensor]) -> Tensor:
        left, right = matrices
        losses: Tensor = (left @ right.mT - goal).square().sum((-2, -1)) / 2
        return losses

    return Instance((0.1 * _normal((48, 6), generator), 0.1 * _normal((32, 6), generator)), loss)


def _positive_definite(size: int, generator: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(_normal((size, size), generator))[0]
    eigenvalues = torch.linspace(0, 1, size, dtype=torch.float64)
    matrix: Tensor = basis * _CONDITION ** (eigenvalues - 1) @ basis.mT
    return matrix


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


PROBLEMS: dict[str, MatrixProblem] = {
    problem.name: problem
    for problem in (
        MatrixProblem(
            "kronecker_quadratic",
            "Kronecker quadratic",
            "½ tr((W − W*)ᵀ A (W − W*) B), W 24 × 40, condition 1000",
            500,
            _kronecker_quadratic,
        ),
        MatrixProblem(
            "matrix_factorization",
            "Matrix factorization",
            "½ ‖U Vᵀ − M‖², M 48 × 32 of rank 6",
            500,
            _matrix_factorization,
        ),
    )
}
