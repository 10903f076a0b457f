"""What an optimizer's state tells about each parameter: the spread of its scales, its preconditioners' eigenvalues."""

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
"""An odd number: where the clamps lie evenly about 1, at which all scales start, it is in the middle of a bin."""


@dataclass(frozen=True)
class ScaleDistribution:
    """The scales of one parameter's elements: their mean, the shares at the clamps, and how many fall into each bin."""

    mean: float
    at_min: float
    at_max: float
    histogram: list[int]


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of one factor of a parameter's preconditioner, without `eps`; over its blocks where it has any.

    An eigenvalue up to float32's resolution of the largest (1.2e-7 of it) is rounding error: it does not count to the
    rank, and a matrix that has one is singular, with a condition number of infinity.
    """

    side: int
    largest: float
    smallest: float
    rank: int
    """The least over the blocks."""
    condition: float
    """Largest over smallest eigenvalue; the median over the blocks, of an even number the lower middle."""
    largest_condition: float


def scale_edges(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """Limits of the bins, evenly spaced in logarithms from the smallest scale to the largest; None without scales.

    Where the smallest scale is 0, or is the largest too, they begin at a ten-thousandth of the largest. The first bin
    and the last take in what lies outside.
    """
    if not isinstance(optimizer, Asro | AccAsro):
        return None
    low, high = _clamps(optimizer.defaults)
    low = low if 0 < low < high else high * 1e-4
    return [low * (high / low) ** (index / SCALE_BINS) for index in range(SCALE_BINS + 1)]


@torch.no_grad()
def scale_distributions(optimizer: torch.optim.Optimizer) -> dict[Tensor, ScaleDistribution]:
    """Of each parameter that has taken a step with `Asro` or `AccAsro`; empty for other optimizers.

    The bins are those of `scale_edges`. Takes twice the memory of the largest parameter meanwhile.
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
    """Of each matrix that has taken a step with `ASGO` or `Shampoo`, by the names of its factors; else empty.

    Computed in float64, on the parameters' device, except on Apple's GPUs, which have none: there on the CPU.
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
    """The parameters of a group that have taken a step."""
    return [param for param in group["params"] if optimizer.state.get(param)]


def _clamps(group: Group) -> tuple[float, float]:
    """The smallest scale and the largest; Asro has no name for its largest, 1."""
    return group["min_scale"], group.get("max_scale", 1.0)


def _counts(scale: Tensor, group: Group, edges: list[float]) -> Tensor:
    """How many elements are at the lower clamp, at the upper one, and in each bin; int64, shape (2 + bins,)."""
    low, high = _clamps(group)
    width = math.log(edges[-1] / edges[0]) / SCALE_BINS
    # Ten times as fast as a search among the edges, and off by no more than a rounding of the logarithm.
    bins = scale.flatten().log().sub_(math.log(edges[0])).div_(width).clamp_(0, SCALE_BINS - 1).to(torch.int64)
    ends = torch.stack([(scale <= low).sum(), (scale >= high).sum()])
    return torch.cat([ends, torch.bincount(bins, minlength=SCALE_BINS)])


def _eigenvalues(optimizer: PreconditionedOptimizer, stack: Stack, key: str) -> list[Tensor]:
    """Eigenvalues of a factor of each block, ascending, in float64 on the host; NaN where the factor is not finite."""
    factors = [Factor(optimizer.state[block.param], key, block.suffix, "") for block in stack.blocks]
    matrices = torch.stack([factor.state[factor.key] for factor in factors])
    scales = torch.stack([factor.state[factor.scale_key] for factor in factors])
    device = torch.device("cpu") if matrices.device.type == "mps" else matrices.device
    matrices, scales = matrices.to(device, torch.float64), scales.to(device, torch.float64)[:, None]
    finite = matrices.isfinite().all(-1).all(-1)  # LAPACK refuses what is not
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
