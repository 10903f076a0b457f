"""Table of the optimizers: class, keywords with defaults and ranges, title. Does not import torch.

Argument checks, run settings, help texts and figures are derived from this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

RootMethod = Literal["auto", "eigh", "polar_express", "newton_schulz", "newton", "cholesky"]
RootPrecision = Literal["bf16", "fp32"]
UpdateScale = Literal["match_rms_adamw", "original"]

PARTS = ("embedding", "head", "vectors", "matrices")
"""Parts of a model whose parameters may have keywords of their own: embeddings (token and positional, tied or not),
output heads, all others (gains, biases), and hidden weight matrices."""

ADAM_KEYWORDS = ("lr", "betas", "eps", "weight_decay")
"""Keywords of the parameters that a matrix optimizer leaves to Adam."""

REQUIRED: Final = ...
"""Marks a keyword without default."""


@dataclass(frozen=True)
class Range:
    """Valid values of a keyword: numbers, a flag (`type` is bool), or one of `choices`."""

    words: str
    """Description of a valid value, for messages."""
    type: type[float] | type[int] | type[bool] | type[str]
    ge: float | None = None
    gt: float | None = None
    lt: float | None = None
    most: float | None = None
    """Upper limit in settings files, so that they cannot cause an unbounded loop. Constructors do not check it."""
    length: int = 1
    """Numbers in a value; more than one are a tuple."""
    choices: tuple[str, ...] = ()


NOT_NEGATIVE = Range("a finite number >= 0", float, ge=0)
POSITIVE = Range("a finite number > 0", float, gt=0)
FRACTION = Range("a number in [0, 1]", float, ge=0, most=1)
DECAY = Range("a number in [0, 1)", float, ge=0, lt=1)
PAIR_OF_DECAYS = Range("two numbers in [0, 1)", float, ge=0, lt=1, length=2)
COEFFICIENTS = Range("three finite numbers", float, length=3)
EXPONENT = Range("a number in [-1, 0)", float, ge=-1, lt=0)
COUNT = Range("a whole number >= 0", int, ge=0, most=10**12)
POSITIVE_COUNT = Range("a whole number >= 1", int, gt=0, most=10**12)
REPEATS = Range("a whole number >= 1", int, gt=0, most=1000)
"""For iterations within a step."""
FLAG = Range("True or False", bool)
ROOT_METHODS = Range(f"one of {', '.join(get_args(RootMethod))}", str, choices=get_args(RootMethod))
ROOT_PRECISIONS = Range(f"one of {', '.join(get_args(RootPrecision))}", str, choices=get_args(RootPrecision))
UPDATE_SCALES = Range(f"one of {', '.join(get_args(UpdateScale))}", str, choices=get_args(UpdateScale))

RANGES: Mapping[str, Range] = {
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
    "increment": NOT_NEGATIVE,
    "decrement": NOT_NEGATIVE,
    "min_scale": NOT_NEGATIVE,
    "max_scale": POSITIVE,
    "momentum": DECAY,
    "beta2": DECAY,
    "betas": PAIR_OF_DECAYS,
    "nesterov": FLAG,
    "maximize": FLAG,
    "capturable": FLAG,
    "batch_dims": COUNT,
    "ns_steps": REPEATS,
    "root_steps": REPEATS,
    "precond_frequency": POSITIVE_COUNT,
    "total_steps": POSITIVE_COUNT,
    "scale_start_step": COUNT,
    "root_method": ROOT_METHODS,
    "root_precision": ROOT_PRECISIONS,
    "ns_coefficients": COEFFICIENTS,
    "adjust_lr_fn": UPDATE_SCALES,
    "exponent": EXPONENT,
}
"""Ranges by keyword, for constructors and parameter groups of the optimizers in this package, and for settings."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and the name by which users select it."""

    name: str
    title: str
    """Name in figures."""
    module: str
    """Module name, relative to this package or absolute."""
    class_name: str
    defaults: Mapping[str, Any]
    """Keywords of the constructor in its order, with their defaults or `REQUIRED`; they are the settings."""
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Ranges of keywords that are not in `RANGES`, or that settings limit further."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Constructor keywords that the name implies."""
    takes_matrices: bool = False
    """Whether the class derives from `MatrixOptimizer`."""

    def __post_init__(self) -> None:
        for keyword in self.defaults:
            assert keyword in self.ranges or keyword in RANGES, f"{self.name}: {keyword} has no range"

    @property
    def is_own(self) -> bool:
        """Whether this package implements it."""
        return self.module.startswith(".")

    def range_of(self, keyword: str) -> Range:
        """Return the valid values of a setting."""
        return self.ranges.get(keyword) or RANGES[keyword]

    def part_keywords(self, part: str) -> tuple[str, ...]:
        """Return the keywords that a part of the model may have of its own."""
        return ADAM_KEYWORDS if self.takes_matrices and part != "matrices" else tuple(self.defaults)


_MATRIX = {"lr": 1e-2, "momentum": 0.9}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_TORCH_ADAM = {"lr": REQUIRED, **_ADAM}
_TORCH_SGD = {"lr": REQUIRED, "momentum": 0.9, "weight_decay": 0.0}
_FUSED_SGD = {"fused": True, "momentum": 0.9}
_MOMENTUM = {"momentum": Range("a number in (0, 1)", float, gt=0, lt=1)}

_SPECS = (
    OptimizerSpec(
        "asgo", "ASGO", ".asgo", "ASGO",
        {
            **_MATRIX, "beta2": 0.8, "eps": 1e-10, "weight_decay": 0.1, "root_method": "auto", "root_steps": 10,
            "precond_frequency": 1, "root_precision": "bf16",
        },
        takes_matrices=True,
    ),
    OptimizerSpec(
        "dasgo", "DASGO", ".dasgo", "DASGO", {**_MATRIX, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
        takes_matrices=True,
    ),
    OptimizerSpec(
        "muon", "Muon", ".muon", "Muon",
        {
            **_MATRIX, "nesterov": False, "ns_steps": 5, "weight_decay": 0.1,
            "ns_coefficients": (3.4445, -4.7750, 2.0315), "adjust_lr_fn": "match_rms_adamw",
        },
        takes_matrices=True,
    ),
    OptimizerSpec(
        "shampoo", "Shampoo", ".shampoo", "Shampoo",
        {
            **_MATRIX, "lr": 5e-3, "beta2": 0.999, "eps": 1e-10, "weight_decay": 0.1, "precond_frequency": 1,
            "exponent": -0.25,
        },
        takes_matrices=True,
    ),
    OptimizerSpec(
        "asro", "Asro", ".asro", "Asro",
        {"lr": REQUIRED, "decrement": REQUIRED, "min_scale": REQUIRED, "scale_start_step": 0, **_ADAM},
        ranges={"min_scale": FRACTION},
    ),
    OptimizerSpec(
        "accasro", "AccAsro", ".accasro", "AccAsro",
        {
            "lr": REQUIRED, "increment": REQUIRED, "decrement": REQUIRED, "max_scale": REQUIRED, "min_scale": REQUIRED,
            "scale_start_step": 0, **_ADAM,
        },
    ),
    OptimizerSpec("adam", "Adam", "torch.optim", "Adam", _TORCH_ADAM, implied={"fused": True}),
    OptimizerSpec("adamw", "AdamW", "torch.optim", "AdamW", _TORCH_ADAM, implied={"fused": True}),
    OptimizerSpec("amsgrad", "AMSGrad", "torch.optim", "Adam", _TORCH_ADAM, implied={"fused": True, "amsgrad": True}),
    OptimizerSpec("radam", "RAdam", "torch.optim", "RAdam", _TORCH_ADAM),
    OptimizerSpec(
        "rmsprop", "RMSprop", "torch.optim", "RMSprop",
        {"lr": REQUIRED, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0},
        ranges={"alpha": DECAY},
    ),
    OptimizerSpec(
        "adagrad", "Adagrad", "torch.optim", "Adagrad", {"lr": REQUIRED, "eps": 1e-10, "weight_decay": 0.0}
    ),
    OptimizerSpec(
        "sgd-momentum", "SGD momentum", "torch.optim", "SGD", _TORCH_SGD, ranges=_MOMENTUM, implied=_FUSED_SGD
    ),
    OptimizerSpec(
        "sgd-nesterov", "SGD Nesterov", "torch.optim", "SGD", _TORCH_SGD, ranges=_MOMENTUM,
        implied={**_FUSED_SGD, "nesterov": True},
    ),
)  # fmt: skip

SPECS: Mapping[str, OptimizerSpec] = {spec.name: spec for spec in _SPECS}
"""The optimizers by name, in the order in which they are listed."""

OPTIMIZER_NAMES: tuple[str, ...] = tuple(SPECS)


def spec_of(name: str) -> OptimizerSpec:
    """Return the optimizer of a name. Raises `ValueError`, with the closest match, for an unknown name."""
    if name not in SPECS:
        raise unknown_name("optimizer", name, OPTIMIZER_NAMES)
    return SPECS[name]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with the closest match or a list of known names."""
    known = list(known)
    by_lower = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    listed = f"known: {', '.join(known[:20])}{more}" if known else "there are none"
    hint = f"did you mean {by_lower[nearest[0]]!r}?" if nearest else listed
    return ValueError(f"unknown {kind}: {name!r}; {hint}")
