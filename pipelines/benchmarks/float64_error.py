"""Error of an optimizer's update relative to the same formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipelines.benchmarks.gradients import conditioned_gradients
from pipelines.benchmarks.peers import OURS, Choice
from pipelines.benchmarks.shapes import Matrices

CONDITION = 1e4
STEPS = 5
SHAPES = {"wide": (256, 384), "tall": (384, 256)}
_SEED = 17

Group = dict[str, Any]
Gradients = dict[str, list[Tensor]]
Reference = Callable[[Choice, Gradients, Group], list[Tensor]]

_ADAMW_KEYWORDS = {"lr", "betas", "eps", "weight_decay"}
_MUON_KEYWORDS = {"lr", "momentum", "nesterov", "ns_steps", "weight_decay"}


def float64_error(choice: Choice, device: torch.device) -> float | None:
    """Return the relative Frobenius error of the movement of two matrices in five steps; None without a reference.

    The matrices have shapes (256, 384) and (384, 256) and start at zero. Both sides get the same float32 gradients `G`;
    `G Gᵀ` has condition 1e4. The reference runs on the CPU, in float64:

    * ASGO and Shampoo: the published algorithm with exact roots, by eigendecomposition.
    * Others of ours and of `torch.optim`: the same class.
    * Muon of `torch.optim` and `pytorch_optimizer`, which always compute in bfloat16: our Muon. The norm of their
      updates is a convention, so both sides are normalized to 1.
    * AdamW of `pytorch_optimizer`: `torch.optim.AdamW`.

    heavyball has no reference, because its rules differ: its AdamW, for example, uses `eps` as a bound.
    """
    reference = _reference_of(choice)
    if reference is None:
        return None
    gradients = {
        key: [gradient.float().double() for gradient in conditioned_gradients(shape, CONDITION, STEPS, _SEED)]
        for key, shape in SHAPES.items()
    }
    moved, group = _run(choice, gradients, device, torch.float32)
    expected = reference(choice, gradients, group)
    if reference is _our_muon:
        moved, expected = ([matrix / matrix.norm() for matrix in side] for side in (moved, expected))
    difference = math.hypot(*((a - b).norm().item() for a, b in zip(moved, expected, strict=True)))
    return difference / math.hypot(*(b.norm().item() for b in expected))


def _reference_of(choice: Choice) -> Reference | None:
    given = set(choice.keywords)
    if choice.library == OURS:
        return {"asgo": _asgo, "shampoo": _shampoo}.get(choice.optimizer, _same_class)
    if choice.library == "heavyball":
        return None
    if choice.optimizer == "Muon":
        return _our_muon if given <= _MUON_KEYWORDS else None
    if choice.library == "torch":
        return _same_class
    return _torch_adamw if choice.optimizer == "AdamW" and given <= _ADAMW_KEYWORDS else None


def _run(choice: Choice, gradients: Gradients, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Group]:
    """Run all steps from zero; return the matrices, in float64 on the CPU, and the first parameter group."""
    model = Matrices(SHAPES).to(device, dtype)
    params = list(model.parameters())
    with torch.no_grad():
        for param in params:
            param.zero_()
    optimizers = choice.build(model)
    for step in range(STEPS):
        for param, key in zip(params, SHAPES, strict=True):
            param.grad = gradients[key][step].to(dtype).to(device)
        for optimizer in optimizers:
            optimizer.step()
    return [param.detach().cpu().double() for param in params], optimizers[0].param_groups[0]


def _same_class(choice: Choice, gradients: Gradients, group: Group) -> list[Tensor]:
    return _run(choice, gradients, torch.device("cpu"), torch.float64)[0]


def _our_muon(choice: Choice, gradients: Gradients, group: Group) -> list[Tensor]:
    muon = Choice("muon", OURS, "muon", {key: group[key] for key in _MUON_KEYWORDS})
    return _same_class(muon, gradients, group)


def _torch_adamw(choice: Choice, gradients: Gradients, group: Group) -> list[Tensor]:
    adamw = Choice("AdamW", "torch", "AdamW", {key: group[key] for key in _ADAMW_KEYWORDS})
    return _same_class(adamw, gradients, group)


def _asgo(choice: Choice, gradients: Gradients, group: Group) -> list[Tensor]:
    return [_asgo_path(each, group) for each in gradients.values()]


def _shampoo(choice: Choice, gradients: Gradients, group: Group) -> list[Tensor]:
    return [_shampoo_path(each, group) for each in gradients.values()]


def _asgo_path(gradients: list[Tensor], group: Group) -> Tensor:
    """Run arXiv 2503.20762, Algorithm 2, from zero. Gradients and result have shape (m, n)."""
    m, n = gradients[0].shape
    side, lr = min(m, n), float(group["lr"])
    weight, momentum, factor = _zeros(m, n), _zeros(m, n), _zeros(side, side)
    for step, g in enumerate(gradients):
        momentum.lerp_(g, 1 - group["momentum"])
        factor.lerp_(g @ g.mT if m < n else g.mT @ g, 1 - group["beta2"])
        if step % group["precond_frequency"] == 0:
            root = _inverse_root(factor, 2, ridge=None)
        update = root @ momentum if m < n else momentum @ root
        update *= 0.2 * math.sqrt(m * n) / update.norm()
        weight = (1 - lr * group["weight_decay"]) * weight - lr * update
    return weight


def _shampoo_path(gradients: list[Tensor], group: Group) -> Tensor:
    """Run arXiv 1802.09568 with averaged factors and Adam's norm, from zero. Gradients and result: (m, n)."""
    m, n = gradients[0].shape
    lr, eps = float(group["lr"]), group["eps"]
    weight, momentum, squares = _zeros(m, n), _zeros(m, n), _zeros(m, n)
    left, right = _zeros(m, m), _zeros(n, n)
    for step, g in enumerate(gradients):
        momentum.lerp_(g, 1 - group["momentum"])
        for average, value in ((squares, g.square()), (left, g @ g.mT), (right, g.mT @ g)):
            average.lerp_(value, 1 - group["beta2"])
        if step % group["precond_frequency"] == 0:
            left_root, right_root = _inverse_root(left, 4, eps), _inverse_root(right, 4, eps)
        update = left_root @ momentum @ right_root
        update *= (momentum / (squares + eps).sqrt()).norm() / update.norm()
        weight = (1 - lr * group["weight_decay"]) * weight - lr * update
    return weight


def _inverse_root(matrix: Tensor, order: int, ridge: float | None) -> Tensor:
    """Return `(A + ridge I)^{-1/order}`, exactly. Without a ridge, eigenvalues below rounding give 0."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > (values[-1] * len(values) * 1e-14 if ridge is None else -math.inf)
    powers = (values.clamp_min(0) + (ridge or 0.0)).pow(-1 / order)
    root: Tensor = (vectors * torch.where(kept, powers, 0.0)) @ vectors.mT
    return root


def _zeros(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)
