"""The template of the optimizers that treat a weight as a matrix, with Adam for the parameters that are none."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.adam import adam_direction, adam_state, update_moments
from optim.base import BaseOptimizer, Group, State, apply_update, describe, gradient

UPDATE_RMS = 0.2
"""Root mean square of an update's entries: about AdamW's, so its learning rates carry over (arXiv 2502.16982)."""

ADAM_RULE: dict[str, Any] = {"rule": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""A parameter group with these keys takes Adam, at the optimizer's learning rate, instead of the matrix rule."""


@dataclass
class RootMonitor:
    """Warns once a parameter whose inverse root was not finite, without making a device wait for the answer."""

    warned: set[str] = field(default_factory=set)
    in_flight: list[tuple[torch.cuda.Event, Tensor, list[str]]] = field(default_factory=list)

    def watch(self, finite: Tensor, names: list[str]) -> None:
        """Take note of one flag a parameter, shape (len(names),)."""
        if finite.device.type != "cuda":
            self._warn(finite, names)
            return
        arriving = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
        arriving.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.in_flight.append((event, arriving, names))

    def poll(self) -> None:
        """Warn about what has arrived from the device since the last call."""
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
    """Template: a subclass implements `matrix_state` and `matrix_updates`; stacking, Adam and weight decay are here.

    A parameter of three or more dimensions is a matrix of shape (first dimension, all others).
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_monitor", RootMonitor())

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._monitor = RootMonitor()
        super().__init__(params, {**defaults, "rule": "matrix"})

    def matrix_state(self, matrix: Tensor, group: Group) -> State:
        """The state of a parameter before its first step; `matrix` is its gradient, shape (m, n)."""
        raise AssertionError("a subclass implements this")

    def matrix_updates(self, grads: Tensor, states: list[State], names: list[str], group: Group) -> Tensor:
        """Move the states by one step and return the updates `U`; `grads` and they are stacks, shape (k, m, n)."""
        raise AssertionError("a subclass implements this")

    def known_group_keys(self) -> set[str]:
        """Those of the matrix rule and of the Adam rule."""
        return {*super().known_group_keys(), *ADAM_RULE}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; with `rule="adam"` they take Adam (betas 0.9, 0.95, eps 1e-8, no weight decay)."""
        rule = param_group.get("rule", "matrix")
        if rule not in ("matrix", "adam"):
            raise ValueError(f"invalid rule: {rule!r}; it must be 'matrix' or 'adam'")
        for key in param_group:
            if rule == "matrix" and key in ADAM_RULE and key not in self.defaults:
                raise ValueError(f"parameter group key {key!r} goes with rule='adam'; {type(self).__name__} has none")
        super().add_param_group({**ADAM_RULE, **param_group} if rule == "adam" else param_group)

    def check_param(self, group: Group, index: int, param: Tensor) -> None:
        """The matrix rule needs two dimensions or more."""
        super().check_param(group, index, param)
        if group["rule"] == "matrix" and param.ndim < 2:
            raise ValueError(
                f"{type(self).__name__} takes matrices; {describe(group, index)} is none: "
                "give it a parameter group with rule='adam'"
            )

    def update_group(self, group: Group, params: list[Tensor]) -> None:
        """Update all matrices of equal shape, dtype and device together, or each other parameter with Adam."""
        if group["rule"] == "adam":
            for param in params:
                self._update_with_adam(param, group)
            return
        self._monitor.poll()
        names = {param: describe(group, index) for index, param in enumerate(group["params"])}
        for bucket in _alike(params):
            self._update_matrices(bucket, [names[param] for param in bucket], group)

    def _update_matrices(self, params: list[Tensor], names: list[str], group: Group) -> None:
        grads = torch.stack([gradient(param).flatten(1) for param in params])
        states = [self.state[param] for param in params]
        for grad, state in zip(grads, states, strict=True):
            if not state:
                state.update(self.matrix_state(grad, group))
        updates = self.matrix_updates(grads, states, names, group)
        for param, update in zip(params, updates, strict=True):
            apply_update(param, update.reshape(param.shape), group["lr"], group["weight_decay"])

    def _update_with_adam(self, param: Tensor, group: Group) -> None:
        state = self.state[param]
        if not state:
            state.update(adam_state(param))
        update_moments(gradient(param), state, group["betas"])
        update = adam_direction(state, group["betas"], group["eps"])
        apply_update(param, update, group["lr"], group["weight_decay"])

    def finite_or_identity(self, roots: Tensor, names: list[str]) -> Tensor:
        """Inverse roots (k, m, m) with the identity where one is not finite, which the user is told once."""
        finite = torch.isfinite(roots).all(-1).all(-1)
        self._monitor.watch(finite, names)
        identity = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        return torch.where(finite[:, None, None], roots, identity)


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters in buckets of equal shape, dtype and device, in order of appearance."""
    buckets: dict[object, list[Tensor]] = defaultdict(list)
    for param in params:
        buckets[param.shape, param.dtype, param.device].append(param)
    return list(buckets.values())


def move_average(states: list[State], key: str, values: Tensor, weight: float) -> Tensor:
    """Move `state[key]` towards `values`, shape (k, ...), by `lerp` with `weight`; returns the averages as a stack."""
    averages = [state[key] for state in states]
    torch._foreach_lerp_(averages, list(values), weight)
    return torch.stack(averages)


def with_norm(updates: Tensor, norm: float | Tensor) -> Tensor:
    """Each of the updates, shape (k, m, n), scaled to a Frobenius norm; a zero update stays zero."""
    current = torch.linalg.matrix_norm(updates)[:, None, None]
    return updates * torch.where(current > 0, norm / current, 0.0)
