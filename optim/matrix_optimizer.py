"""The template of the optimizers that treat a weight as a matrix, with Adam for the parameters that are none."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adam import update_with_adam, zero_moments
from .base import BaseOptimizer, Group, State, can_be_read, describe, gradient, is_plain, new_step, state_dtype
from .blocks import Stack, block_sizes, blocks_of, stacks_of
from .matrix_functions import scaled_to_one

UPDATE_RMS = 0.2
"""Root mean square of an update's entries: about AdamW's, so its learning rates carry over (arXiv 2502.16982)."""

ADAM_RULE: dict[str, Any] = {"rule": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""A parameter group with these keys takes Adam, at the optimizer's learning rate, instead of the matrix rule."""

_WHOLE: dict[str, Any] = {"row_blocks": None, "batch_dims": 0}
"""A parameter is one matrix, unless its group says otherwise."""


@dataclass
class RootMonitor:
    """Warns once a parameter whose inverse root was not finite, without making a device wait for the answer."""

    warned: set[str] = field(default_factory=set)
    in_flight: list[tuple[torch.cuda.Event, Tensor, list[str]]] = field(default_factory=list)

    def watch(self, finite: Tensor, names: list[str]) -> None:
        """Take note of one flag a parameter, shape (len(names),)."""
        if can_be_read(finite):
            self._warn(finite, names)
        if finite.device.type != "cuda" or not is_plain(finite):
            return
        if torch.cuda.is_current_stream_capturing():
            return  # nothing may be read from within a CUDA graph
        arriving = torch.empty(finite.shape, dtype=finite.dtype, device="cpu", pin_memory=True)
        arriving.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.in_flight.append((event, arriving, names))

    def poll(self) -> None:
        """Warn about what has arrived from the device since the last call."""
        if not self.in_flight or torch.cuda.is_current_stream_capturing():
            return
        arrived = [entry for entry in self.in_flight if entry[0].query()]  # type: ignore[no-untyped-call]
        self.in_flight = [entry for entry in self.in_flight if entry not in arrived]
        for _, finite, names in arrived:
            self._warn(finite, names)

    def _warn(self, finite: Tensor, names: list[str]) -> None:
        for name, is_finite in zip(names, finite.tolist(), strict=True):
            if not is_finite and name not in self.warned:
                self.warned.add(name)
                warnings.warn(
                    f"the inverse root of {name} is not finite; the identity takes its place for such steps",
                    stacklevel=2,
                )


class MatrixOptimizer(BaseOptimizer):
    """Template: a subclass implements `block_state` and `update_matrices`; the momentum, blocks and Adam are here.

    A parameter of three or more dimensions is a matrix of shape (first dimension, all others), or with `batch_dims` as
    many matrices as its first dimensions count, each of shape (next dimension, all others).
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_monitor", RootMonitor())

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._monitor = RootMonitor()
        super().__init__(params, {**defaults, "rule": "matrix", **_WHOLE})

    def block_state(self, shape: tuple[int, int], like: Tensor) -> State:
        """The state of a block of (rows, columns) before its first step, on the device of `like` in its precision."""
        return {}

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Update parameters of the matrix rule, in place."""
        raise AssertionError("a subclass implements this")

    def group_keywords(self) -> list[str]:
        """Those of the matrix rule and of the Adam rule."""
        return [*super().group_keywords(), *ADAM_RULE]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; three keys are for groups alone.

        With `rule="adam"` they take Adam (betas 0.9, 0.95, eps 1e-8, no weight decay). With `row_blocks`, a number of
        equal blocks or the rows of each, every block of a parameter's rows is a matrix of its own: `row_blocks=heads`
        for the query and key projections of attention, as the ASGO paper does. `batch_dims=1` makes each of the E
        experts of a parameter of shape (E, m, n) a matrix of its own, with blocks of its own m rows.

        Raises `ValueError` for a misspelled keyword, a value out of range, or a parameter that is no matrix.
        """
        rule = param_group.get("rule", "matrix")
        if rule not in ("matrix", "adam"):
            raise ValueError(f"invalid rule: {rule!r}; it must be 'matrix' or 'adam'")
        for key, unset in _WHOLE.items():
            if rule == "adam" and param_group.get(key, unset) != unset:
                raise ValueError(f"parameter group key {key!r} goes with rule='matrix'; Adam has no matrices")
        for key in param_group:
            if rule == "matrix" and key in ADAM_RULE and key not in self.defaults:
                raise ValueError(f"parameter group key {key!r} goes with rule='adam'; {type(self).__name__} has none")
        super().add_param_group({**ADAM_RULE, **param_group} if rule == "adam" else param_group)

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """The matrix rule needs two dimensions or more besides those of a batch, and blocks that add up to the rows."""
        super().check_param(group, index, param)
        if group["rule"] == "adam":
            return
        if param.ndim < 2 + group["batch_dims"]:
            count = f" with batch_dims={group['batch_dims']}" if group["batch_dims"] else ""
            raise ValueError(
                f"{type(self).__name__} takes matrices; {describe(group, index)} is none{count}: "
                "give it a parameter group with rule='adam'"
            )
        _check_row_blocks(group, index, param)

    def needs_whole(self, group: Group) -> bool:
        """A matrix is one on all ranks."""
        return bool(group["rule"] == "matrix")

    def step_device(self, group: Group, param: Tensor) -> torch.device:
        """PyTorch's fused Adam wants the count of steps beside the parameter."""
        return param.device if group["rule"] == "adam" else super().step_device(group, param)

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update the group's matrices, or each other parameter with Adam."""
        self.prepare_states(group, params)
        if group["rule"] == "matrix":
            self._monitor.poll()
            self.update_matrices(params, group)
            return
        for alike in of_one_kind(params):
            update_with_adam(alike, [self.state[param] for param in alike], group)

    def initial_state(self, group: Group, param: Tensor) -> State:
        """Adam's, or the momentum and the state of the parameter and of its blocks."""
        if group["rule"] == "adam":
            return {"step": new_step(self.step_device(group, param)), **zero_moments(param)}
        like = param.new_zeros((), dtype=state_dtype(param))
        state = {"exp_avg": torch.zeros_like(param, dtype=like.dtype), **self.param_state(param, group)}
        for block in blocks_of(param, group):
            for key, value in self.block_state(block.shape, like).items():
                state[block.key(key)] = value
        return state

    def param_state(self, param: Tensor, group: Group) -> State:
        """The state of a parameter before its first step that does not depend on its blocks, besides the momentum."""
        return {}

    def stacks(self, params: list[Tensor], group: Group) -> list[Stack]:
        """The parameters' blocks, in stacks of equal shape."""
        return stacks_of([block for param in params for block in blocks_of(param, group)])

    def moved_momenta(self, params: list[Tensor], group: Group) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Each parameter's gradient, and its momentum `M ← lerp(M, G, 1 − momentum)`, moved by this step."""
        grads = {param: gradient(param, group["maximize"]) for param in params}
        momenta = {param: self.state[param]["exp_avg"] for param in params}
        for alike in of_one_kind(params):
            torch._foreach_lerp_([momenta[p] for p in alike], [grads[p] for p in alike], 1 - group["momentum"])
        return grads, momenta

    def finite_or_identity(self, roots: Tensor, names: list[str]) -> Tensor:
        """Inverse roots (k, p, p) with the identity where one is not finite, which the user is told once."""
        finite = torch.isfinite(roots).all(-1).all(-1)
        self._monitor.watch(finite, names)
        identity = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        return torch.where(finite[:, None, None], roots, identity)


def with_norm(updates: Tensor, norm: float | Tensor) -> Tensor:
    """Each of the updates, shape (k, m, n), scaled to a Frobenius norm; a zero update stays zero."""
    unit = scaled_to_one(updates)
    return unit.mul_(norm / torch.linalg.matrix_norm(unit, keepdim=True).clamp_min(1.0))


def _check_row_blocks(group: Group, index: int, param: Tensor) -> None:
    row_blocks, rows = group["row_blocks"], param.shape[group["batch_dims"]]
    if sum(block_sizes(rows, row_blocks)) != rows:
        raise ValueError(
            f"invalid row_blocks: {row_blocks!r} does not divide the {rows} rows of {describe(group, index)}"
        )


def of_one_kind(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters in lists of one dtype and device, in order of appearance."""
    kinds: dict[object, list[Tensor]] = defaultdict(list)
    for param in params:
        kinds[param.dtype, param.device].append(param)
    return list(kinds.values())
