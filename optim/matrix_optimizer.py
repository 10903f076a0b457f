"""Base class of the optimizers that treat weights as matrices, with Adam for all other parameters."""

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
"""RMS of an update, about that of AdamW, so learning rates for AdamW work (arXiv 2502.16982)."""

ADAM_RULE: dict[str, Any] = {"rule": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""Parameter group keys that select Adam, at the optimizer's learning rate, instead of the matrix rule."""

_WHOLE: dict[str, Any] = {"row_blocks": None, "batch_dims": 0}
"""Defaults of the keys that split a parameter: it is one matrix."""


@dataclass
class RootMonitor:
    """Warns once per parameter if an inverse root is not finite, without a GPU synchronization."""

    warned: set[str] = field(default_factory=set)
    in_flight: list[tuple[torch.cuda.Event, Tensor, list[str]]] = field(default_factory=list)

    def watch(self, finite: Tensor, names: list[str]) -> None:
        """Record one flag per parameter, shape (len(names),). Flags on a GPU are copied asynchronously."""
        if can_be_read(finite):
            self._warn(finite, names)
        if finite.device.type != "cuda" or not is_plain(finite):
            return
        if torch.cuda.is_current_stream_capturing():
            return  # during capture, the host cannot read results
        arriving = torch.empty(finite.shape, dtype=finite.dtype, device="cpu", pin_memory=True)
        arriving.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.in_flight.append((event, arriving, names))

    def poll(self) -> None:
        """Warn about flags whose copy from the GPU has finished."""
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
                    f"the inverse root of {name} is not finite; such steps use the identity instead",
                    stacklevel=2,
                )


class MatrixOptimizer(BaseOptimizer):
    """Base class: a subclass implements `block_state` and `update_matrices`. Momentum, blocks and Adam are here.

    A parameter with more than two dimensions is a matrix of shape (first dimension, all others). With `batch_dims`, its
    first dimensions index matrices of shape (next dimension, all others).
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_monitor", RootMonitor())

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._monitor = RootMonitor()
        super().__init__(params, {**defaults, "rule": "matrix", **_WHOLE})

    def block_state(self, shape: tuple[int, int], like: Tensor) -> State:
        """Return the state of a block of shape (rows, columns) before its first step; device and dtype of `like`."""
        return {}

    def update_matrices(self, params: list[Tensor], group: Group) -> None:
        """Update parameters of the matrix rule in place."""
        raise AssertionError("a subclass implements this")

    def group_keywords(self) -> list[str]:
        """Return the keys of the matrix rule and of the Adam rule."""
        return [*super().group_keywords(), *ADAM_RULE]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with three keys that the constructor does not have.

        - `rule="adam"` selects Adam (betas 0.9, 0.95, eps 1e-8, no weight decay).
        - `row_blocks`, the number of equal blocks or the rows of each block, splits the rows of a parameter into
          separate matrices, such as `row_blocks=heads` for query and key projections, as in the ASGO paper.
        - `batch_dims=1` treats a parameter of shape (E, m, n) as E matrices, whose m rows `row_blocks` may split.

        Raises `ValueError` for a misspelled keyword, a value out of range, or a parameter that is not a matrix.
        """
        rule = param_group.get("rule", "matrix")
        if rule not in ("matrix", "adam"):
            raise ValueError(f"invalid rule: {rule!r}; it must be 'matrix' or 'adam'")
        for key, unset in _WHOLE.items():
            if rule == "adam" and param_group.get(key, unset) != unset:
                raise ValueError(f"parameter group key {key!r} requires rule='matrix'; Adam does not use matrices")
        for key in param_group:
            if rule == "matrix" and key in ADAM_RULE and key not in self.defaults:
                name = type(self).__name__
                raise ValueError(f"parameter group key {key!r} requires rule='adam'; {name} has no {key}")
        super().add_param_group({**ADAM_RULE, **param_group} if rule == "adam" else param_group)

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """Raise `ValueError` if a matrix has fewer than two dimensions, or its blocks do not add up to its rows."""
        super().check_param(group, index, param)
        if group["rule"] == "adam":
            return
        if param.ndim < 2 + group["batch_dims"]:
            count = f" with batch_dims={group['batch_dims']}" if group["batch_dims"] else ""
            raise ValueError(
                f"{type(self).__name__} takes matrices; {describe(group, index)} is not a matrix{count}: "
                "put it in a parameter group with rule='adam'"
            )
        _check_row_blocks(group, index, param)

    def needs_whole(self, group: Group) -> bool:
        """Whether the group has the matrix rule, which needs all rows of a matrix."""
        return bool(group["rule"] == "matrix")

    def step_device(self, group: Group, param: Tensor) -> torch.device:
        """Return the device of the step count. PyTorch's fused Adam needs it on the device of the parameter."""
        return param.device if group["rule"] == "adam" else super().step_device(group, param)

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update the group with the matrix rule or with Adam."""
        self.prepare_states(group, params)
        if group["rule"] == "matrix":
            self._monitor.poll()
            self.update_matrices(params, group)
            return
        for alike in of_one_kind(params):
            update_with_adam(alike, [self.state[param] for param in alike], group)

    def initial_state(self, group: Group, param: Tensor) -> State:
        """Return Adam's state, or the momentum with the state of the parameter and of its blocks."""
        if group["rule"] == "adam":
            return {"step": new_step(self.step_device(group, param)), **zero_moments(param)}
        like = param.new_zeros((), dtype=state_dtype(param))
        state = {"exp_avg": torch.zeros_like(param, dtype=like.dtype), **self.param_state(param, group)}
        for block in blocks_of(param, group):
            for key, value in self.block_state(block.shape, like).items():
                state[block.key(key)] = value
        return state

    def param_state(self, param: Tensor, group: Group) -> State:
        """Return the initial state of a parameter other than the momentum and the state of its blocks."""
        return {}

    def stacks(self, params: list[Tensor], group: Group) -> list[Stack]:
        """Return the parameters' blocks, in stacks of equal shape."""
        return stacks_of([block for param in params for block in blocks_of(param, group)])

    def moved_momenta(self, params: list[Tensor], group: Group) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Return the gradients, and the momenta after `M ← lerp(M, G, 1 − momentum)`, by parameter."""
        grads = {param: gradient(param, group["maximize"]) for param in params}
        momenta = {param: self.state[param]["exp_avg"] for param in params}
        for alike in of_one_kind(params):
            torch._foreach_lerp_([momenta[p] for p in alike], [grads[p] for p in alike], 1 - group["momentum"])
        return grads, momenta

    def finite_or_identity(self, roots: Tensor, names: list[str]) -> Tensor:
        """Replace inverse roots (k, ..., p, p) that are not finite with the identity; warns once per parameter."""
        finite = torch.isfinite(roots).flatten(1).all(1)
        self._monitor.watch(finite, names)
        identity = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        return torch.where(finite.view(-1, *(1,) * (roots.ndim - 1)), roots, identity)


def with_norm(updates: Tensor, norm: float | Tensor) -> Tensor:
    """Scale each of the updates, shape (k, m, n), to a Frobenius norm. A zero update stays zero."""
    unit = scaled_to_one(updates)
    return unit.mul_(norm / torch.linalg.matrix_norm(unit, keepdim=True).clamp_min(1.0))


def _check_row_blocks(group: Group, index: int, param: Tensor) -> None:
    row_blocks, rows = group["row_blocks"], param.shape[group["batch_dims"]]
    if sum(block_sizes(rows, row_blocks)) != rows:
        raise ValueError(
            f"invalid row_blocks: {row_blocks!r} does not divide the {rows} rows of {describe(group, index)}"
        )


def of_one_kind(params: list[Tensor]) -> list[list[Tensor]]:
    """Group parameters by dtype and device, in order of appearance."""
    kinds: dict[object, list[Tensor]] = defaultdict(list)
    for param in params:
        kinds[param.dtype, param.device].append(param)
    return list(kinds.values())
