"""What the tests know of each optimizer, and the gradients that they feed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optim import ASGO, DASGO, AccAsro, Asro, Muon, Shampoo

from . import reference

Gradients = Sequence[np.ndarray | None]

MATRIX = ["asgo", "dasgo", "muon", "shampoo"]
ELEMENTWISE = ["asro", "accasro"]
BASELINES = ["adam", "adamw", "amsgrad", "radam", "rmsprop", "adagrad", "sgd-momentum", "sgd-nesterov"]
PUBLISHED = [*MATRIX, *ELEMENTWISE, *BASELINES]
"""The names that are promised, in their order. There may be more."""


@dataclass(frozen=True)
class Description:
    """An optimizer: its reference, good keywords, another value for each keyword, and values it must refuse."""

    optimizer: type[torch.optim.Optimizer]
    reference: type[reference.Reference]
    overrides: dict[str, Any]
    refused: dict[str, list[Any]]
    keywords: dict[str, Any] = field(default_factory=dict)
    matrix: bool = True

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def build(self, params: Any, **keywords: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **{**self.keywords, **keywords})

    def refer(self, w: np.ndarray, **keywords: Any) -> reference.Reference:
        return self.reference(w, **{**self.keywords, **keywords})


NAN, INF = float("nan"), float("inf")
NOT_NEGATIVE = [-0.1, NAN, INF, "0.1", None]
DECAY = [-0.1, 1.0, 1.5, NAN, "0.9"]
COUNT = [0, -1, 2.5, NAN, "5"]
COMMON = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE}
BETAS = [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (0.9, NAN), (0.9,), (0.9, 0.9, 0.9), 0.9]

DESCRIPTIONS = [
    Description(
        ASGO,
        reference.ASGO,
        keywords={"lr": 0.1, "root_method": "eigh"},
        overrides={
            "lr": 0.05, "momentum": 0.5, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0,
            "root_method": "newton_schulz", "root_steps": 3, "precond_frequency": 3,
            "root_precision": "fp32",
        },
        refused={
            **COMMON, "momentum": DECAY, "beta2": DECAY, "eps": NOT_NEGATIVE, "root_method": ["qr", "", None, 3],
            "root_steps": COUNT, "precond_frequency": COUNT, "root_precision": ["bfloat16", "", None, 3],
        },
    ),
    Description(
        DASGO,
        reference.DASGO,
        keywords={"lr": 0.1},
        overrides={"lr": 0.05, "momentum": 0.5, "beta2": 0.5, "eps": 1e-2, "weight_decay": 0.0},
        refused={**COMMON, "momentum": DECAY, "beta2": DECAY, "eps": NOT_NEGATIVE},
    ),
    Description(
        Muon,
        reference.Muon,
        keywords={"lr": 0.1},
        overrides={
            "lr": 0.05, "momentum": 0.5, "nesterov": True, "ns_steps": 3, "weight_decay": 0.0,
            "ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "original",
        },
        refused={
            **COMMON, "momentum": DECAY, "nesterov": ["yes", 2, None], "ns_steps": COUNT,
            "ns_coefficients": [(2.0, -1.5), (2.0, -1.5, NAN), 2.0, "auto", None], "adjust_lr_fn": ["rms", "", None, 3],
        },
    ),
    Description(
        Shampoo,
        reference.Shampoo,
        keywords={"lr": 0.1},
        overrides={
            "lr": 0.05, "momentum": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.0, "precond_frequency": 3,
            "exponent": -1 / 3,
        },
        refused={
            **COMMON, "momentum": DECAY, "beta2": DECAY, "eps": NOT_NEGATIVE, "precond_frequency": COUNT,
            "exponent": [0.0, 0.25, -1.5, NAN, "-1/4", None],
        },
    ),
    Description(
        Asro,
        reference.Asro,
        keywords={"lr": 0.1, "decrement": 0.1, "min_scale": 0.75, "betas": (0.3, 0.999)},
        overrides={
            "lr": 0.05, "decrement": 0.2, "min_scale": 0.9, "scale_start_step": 4, "betas": (0.5, 0.9), "eps": 0.5,
            "weight_decay": 0.2,
        },
        refused={
            **COMMON, "decrement": NOT_NEGATIVE, "min_scale": [-0.1, 1.5, NAN, "0.1"],
            "scale_start_step": [-1, 0.5, NAN], "betas": BETAS, "eps": NOT_NEGATIVE,
        },
        matrix=False,
    ),
    Description(
        AccAsro,
        reference.AccAsro,
        keywords={
            "lr": 0.1, "increment": 0.2, "decrement": 0.1, "max_scale": 1.5, "min_scale": 0.75, "total_steps": 20,
            "betas": (0.3, 0.999),
        },
        overrides={
            "lr": 0.05, "increment": 0.3, "decrement": 0.3, "max_scale": 1.1, "min_scale": 0.9, "total_steps": 10,
            "scale_start_step": 4, "betas": (0.5, 0.9), "eps": 0.5, "weight_decay": 0.2,
        },
        refused={
            **COMMON, "increment": NOT_NEGATIVE, "decrement": NOT_NEGATIVE, "max_scale": [-0.1, NAN, INF, 0.5],
            "min_scale": [-0.1, 1.6, NAN], "total_steps": COUNT, "scale_start_step": [-1, 0.5, NAN], "betas": BETAS,
            "eps": NOT_NEGATIVE,
        },
        matrix=False,
    ),
]  # fmt: skip

every_optimizer = pytest.mark.parametrize("case", DESCRIPTIONS, ids=lambda case: case.name)
matrix_optimizers = pytest.mark.parametrize(
    "case", [case for case in DESCRIPTIONS if case.matrix], ids=lambda case: case.name
)
every_keyword = pytest.mark.parametrize(
    ("case", "keyword"),
    [pytest.param(c, key, id=f"{c.name}-{key}") for c in DESCRIPTIONS for key in c.overrides],
)
SHAPES = [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (1, 1), (4, 2, 3, 3), (20, 2, 3, 3)]


def full_rank(shape: tuple[int, ...], steps: int = 10, seed: int = 0) -> list[np.ndarray]:
    """Gradients of full rank whose singular values lie between 0.4 and 1.6: every root is well conditioned."""
    return low_rank(shape, min(shape[0], int(np.prod(shape[1:]))), steps, seed)


def low_rank(
    shape: tuple[int, ...], rank: int, steps: int = 10, seed: int = 0, moving: bool = True
) -> list[np.ndarray]:
    """Gradients of one rank; their row and column spaces turn at every step, unless not `moving`."""
    rng = np.random.default_rng(seed)
    m, n = shape[0], int(np.prod(shape[1:]))

    def basis(size: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((size, rank)))[0]

    left, right = basis(m), basis(n)
    gradients = []
    for _ in range(steps):
        if moving:
            left, right = basis(m), basis(n)
        gradients.append((left @ basis(rank) * rng.uniform(0.4, 1.6, rank) @ right.T).reshape(shape))
    return gradients


def noise(shape: tuple[int, ...], steps: int = 10, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(steps)]


def start(shape: tuple[int, ...], seed: int = 99) -> np.ndarray:
    """Weights as small as a few updates, so that an error of an update shows in the weights."""
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def parameter(w: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(w, dtype=dtype))


def set_gradient(param: Tensor, gradient: np.ndarray | None) -> None:
    param.grad = None if gradient is None else torch.tensor(gradient, dtype=param.dtype, device=param.device)


def relative_error(param: Tensor, expected: np.ndarray) -> float:
    difference = param.detach().double().numpy() - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300))


def assert_follows(
    case: Description,
    gradients: Gradients,
    *,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    before_step: Callable[[int, torch.optim.Optimizer, reference.Reference], None] | None = None,
    **keywords: Any,
) -> tuple[torch.optim.Optimizer, reference.Reference]:
    """Feed `gradients` (None: no gradient at that step) to optimizer and reference, and compare after each step.

    The tolerance is for float64: a thousand roundings of 1e-16 a step come to 1e-12 after ten steps, times the
    condition of the Gram matrices, a few hundred at most.
    """
    shape = next(g.shape for g in gradients if g is not None)
    param = parameter(start(shape), dtype)
    refer = case.refer(param.detach().double().numpy(), **keywords)
    optimizer = case.build([param], **keywords)
    for index, gradient in enumerate(gradients):
        set_gradient(param, gradient)
        if before_step is not None:
            before_step(index, optimizer, refer)
        optimizer.step()
        if gradient is not None:
            refer.step(param.grad.double().numpy())
        error = relative_error(param, refer.parameter)
        assert error <= tolerance, f"step {index + 1}: relative error {error:.1e}"
    return optimizer, refer
