"""Synthetic gradients: similar to those of a model in training, or with a known condition number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SIGNAL, _NOISE = 1e-3, 3e-4
_SIZE_PER_RANK = 16  # a signal of rank 48 in a matrix of 768 × 768


class GradientSource:
    """Gradients for parameters of any shape, new in each round and the same for every optimizer.

    A matrix (a convolution kernel is flattened to `out × others`) gets a low-rank signal, whose entries have standard
    deviation 1e-3, and noise with 3e-4; a vector gets noise only.
    """

    def __init__(self, params: Sequence[Tensor], seed: int) -> None:
        self._round = [torch.empty_like(param, requires_grad=False) for param in params]
        # Some optimizers of other libraries overwrite the gradient: each gets a copy.
        self._lent = [torch.empty_like(gradient) for gradient in self._round]
        self._generator = torch.Generator(params[0].device).manual_seed(seed)

    def renew(self) -> None:
        """Draw the gradients of the next round."""
        for gradient in self._round:
            gradient.copy_(self._draw(gradient))

    def lend(self, params: Sequence[Tensor]) -> None:
        """Set `grad` of the parameters to a copy of this round's gradients. The next call overwrites the copy."""
        torch._foreach_copy_(self._lent, self._round)
        for param, gradient in zip(params, self._lent, strict=True):
            param.grad = gradient

    def _draw(self, like: Tensor) -> Tensor:
        if like.ndim < 2:
            return _NOISE * self._normal(*like.shape)
        m, n = len(like), like.numel() // len(like)
        rank = max(1, min(m, n) // _SIZE_PER_RANK)
        signal = self._normal(m, rank) @ self._normal(rank, n)
        return (_SIGNAL / math.sqrt(rank) * signal + _NOISE * self._normal(m, n)).view(like.shape)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device)


def conditioned_gradients(shape: tuple[int, int], condition: float, steps: int, seed: int) -> list[Tensor]:
    """Return float64 gradients `G` (m, n) whose `G Gᵀ`, or `Gᵀ G` if n < m, has the given condition number.

    Singular values fall from 1 to `condition ** -1/2` on a logarithmic scale. The singular vectors of the smaller side
    are the same at every step, so the average of the squares has that condition too; those of the other side change.
    """
    m, n = shape
    if m > n:
        return [gradient.mT.contiguous() for gradient in conditioned_gradients((n, m), condition, steps, seed)]
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -math.log10(condition) / 2, m, dtype=torch.float64)
    left = _orthonormal(m, m, generator) * values
    return [left @ _orthonormal(n, m, generator).mT for _ in range(steps)]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q
    return basis
