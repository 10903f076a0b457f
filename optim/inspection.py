"""Statistics of an optimizer's state for each parameter: distribution of scales, eigenvalues of factors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from .accasro import AccAsro
from .asro import Asro
from .base import Group
from .blocks import Stack
from .matrix_functions import decompose
from .preconditioned import Factor, PreconditionedOptimizer

SCALE_BINS = 21
"""Odd, so that 1, the initial scale, is in the middle of a bin if `min_scale = 1 / max_scale`."""


@dataclass(frozen=True)
class ScaleDistribution:
    """Scales of the elements of one parameter: mean, fractions at `min_scale` and `max_scale`, and counts per bin."""

    mean: float
    at_min: float
    at_max: float
    histogram: list[int]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one factor (averaged Gram matrix) of a parameter, without `eps`, over all its blocks.

    Eigenvalues up to float32's resolution (1.2e-7 times the largest) are rounding errors: the rank does not count them,
    and a matrix that has one is singular, with an infinite condition number.
    """

    side: int
    largest: float
    smallest: float
    rank: int
    """Minimum over the blocks."""
    condition: float
    """Largest over smallest eigenvalue: median over the blocks (the lower one of an even number)."""
    largest_condition: float


def scale_edges(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """Return the bin edges, evenly spaced in logarithm from `min_scale` to `max_scale`; None without scales.

    If `min_scale` is 0 or equals `max_scale`, the first edge is `1e-4 · max_scale`. The first and the last bin include
    all scales outside.
    """
    if not isinstance(optimizer, Asro | AccAsro):
        return None
    low, high = _clamps(optimizer.defaults)
    low = low if 0 < low < high else high * 1e-4
    return [low * (high / low) ** (index / SCALE_BINS) for index in range(SCALE_BINS + 1)]


@torch.no_grad()
def scale_distributions(optimizer: torch.optim.Optimizer) -> dict[Tensor, ScaleDistribution]:
    """Return the distribution for each parameter that `Asro` or `AccAsro` has updated; empty for other optimizers.

    The bins are those of `scale_edges`. Needs temporary memory of twice the largest parameter.
    """
    edges = scale_edges(optimizer)
    groups = {param: group for group in optimizer.param_groups for param in _stepped(optimizer, group)}
    if edges is None or not groups:
        return {}
    scales = {param: optimizer.state[param]["scale"] for param in groups}
    means = torch.stack([scale.mean() for scale in scales.values()]).tolist()
    counts = torch.stack([_counts(scale, groups[param], edges) for param, scale in scales.items()]).tolist()
    return {
        param: ScaleDistribution(mean, at_min / param.numel(), at_max / param.numel(), histogram)
        for param, mean, (at_min, at_max, *histogram) in zip(scales, means, counts, strict=True)
    }


@torch.no_grad()
def preconditioner_spectra(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Spectrum]]:
    """Return the spectra, by factor name, of each matrix that `ASGO` or `Shampoo` has updated; empty for others.

    Computed in float64 on the parameters' device; on the CPU for MPS, which does not support float64.
    """
    if not isinstance(optimizer, PreconditionedOptimizer):
        return {}
    blocks: dict[Tensor, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group in optimizer.param_groups:
        params = _stepped(optimizer, group) if group["rule"] == "matrix" else []
        for stack in optimizer.stacks(params, group):
            for key, _ in optimizer.sides(stack.blocks[0].shape):
                for block, eigenvalues in zip(stack.blocks, _eigenvalues(optimizer, stack, key), strict=True):
                    blocks[block.param][key].append(eigenvalues)
    return {param: {key: _spectrum(own[key]) for key in own} for param, own in blocks.items()}


def _stepped(optimizer: torch.optim.Optimizer, group: Group) -> list[Tensor]:
    """Return the parameters of a group that have a state."""
    return [param for param in group["params"] if optimizer.state.get(param)]


def _clamps(group: Group) -> tuple[float, float]:
    """Return `min_scale` and `max_scale`; Asro has no `max_scale` keyword, it is 1."""
    return group["min_scale"], group.get("max_scale", 1.0)


def _counts(scale: Tensor, group: Group, edges: list[float]) -> Tensor:
    """Count the elements at `min_scale`, at `max_scale`, and in each bin; int64, shape (2 + bins,)."""
    low, high = _clamps(group)
    width = math.log(edges[-1] / edges[0]) / SCALE_BINS
    # Ten times as fast as `torch.bucketize`; an error of the logarithm can move only a scale at an edge.
    bins = scale.flatten().log().sub_(math.log(edges[0])).div_(width).clamp_(0, SCALE_BINS - 1).to(torch.int64)
    ends = torch.stack([(scale <= low).sum(), (scale >= high).sum()])
    return torch.cat([ends, torch.bincount(bins, minlength=SCALE_BINS)])


def _eigenvalues(optimizer: PreconditionedOptimizer, stack: Stack, key: str) -> list[Tensor]:
    """Return eigenvalues of each block's factor, ascending, float64 on the CPU; NaN for a factor that is not finite."""
    factors = [Factor(optimizer.state[block.param], key, block.suffix, "") for block in stack.blocks]
    matrices = torch.stack([factor.state[factor.key] for factor in factors])
    scales = torch.stack([factor.state[factor.scale_key] for factor in factors])
    device = torch.device("cpu") if matrices.device.type == "mps" else matrices.device
    matrices, scales = matrices.to(device, torch.float64), scales.to(device, torch.float64)[:, None]
    finite = matrices.isfinite().all(-1).all(-1)  # LAPACK raises for other matrices
    matrices = torch.where(finite[:, None, None], matrices, 0.0)
    try:
        eigenvalues = torch.linalg.eigvalsh(matrices)
    except RuntimeError:
        eigenvalues, _ = decompose(matrices)
    return list(torch.where(finite[:, None], eigenvalues * scales * scales, torch.nan).cpu())


def _spectrum(blocks: list[Tensor]) -> Spectrum:
    eigenvalues = torch.stack(blocks)
    smallest, largest = eigenvalues[:, 0], eigenvalues[:, -1]
    ranks = (eigenvalues > torch.finfo(torch.float32).eps * largest[:, None]).sum(-1)
    conditions = torch.where(ranks == eigenvalues.shape[-1], largest / smallest, torch.inf)
    return Spectrum(
        side=eigenvalues.shape[-1],
        largest=largest.max().item(),
        smallest=smallest.min().item(),
        rank=int(ranks.min()),
        condition=conditions.median().item(),
        largest_condition=conditions.max().item(),
    )
