"""What a comparison of runs finds: plain values, of which the figures, the tables and the page are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.config import RunConfig

Array = npt.NDArray[np.float64]

State = Literal["finished", "unfinished", "diverged", "empty"]
"""Validated after its last step; stopped, or still training; a loss that was not finite, or never below the untrained
model's; nothing recorded yet."""

Outcome = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Curve:
    """Losses in nats a token (or an image) of one split, ascending in steps; four arrays of equal length."""

    steps: Array
    tokens: Array
    """Images, where the run trains on images."""
    seconds: Array
    """Spent in training steps: without validation and saving."""
    losses: Array


@dataclass(frozen=True)
class Band:
    """A curve over seeds: the mean, and the lowest and highest of them, at the steps that all of them have."""

    steps: Array
    tokens: Array
    seconds: Array
    """Mean over the seeds."""
    mean: Array
    lowest: Array
    highest: Array


@dataclass(frozen=True)
class Run:
    """What one run folder tells."""

    name: str
    """Its path below the folder that all compared runs share."""
    path: Path
    config: RunConfig
    data: Mapping[str, Any]
    """The data's description in `config.json`."""
    environment: Mapping[str, Any]
    state: State
    is_trial: bool
    """Whether it was made by a search: it shows what a learning rate does, but is no result."""
    train: Curve
    """Thinned for display: spikes stay."""
    smoothed: Curve
    """Training losses as means over a window, at steps that the runs of an entry share."""
    val: Curve
    """Every validation."""
    val_accuracy: Array
    """Top-1 share at each validation; empty where there is none."""
    final_loss: float | None
    """Of the validation after the last step; None unless finished."""
    final_train_loss: float | None
    """Mean over the last 2 % of the steps; None unless finished."""
    best_loss: float | None
    """Lowest validation loss, whatever the state; None where there is no validation."""
    step_ms: float | None
    """Median over the recorded training steps."""
    optimizer_ms: float | None
    """Median; the optimizer's part of it."""
    state_bytes: int | None
    """Of the optimizer's tensors in the newest checkpoint; None without one."""
    reason: str | None
    """Why it is not finished, in a few words; None where it is."""
    lost_rows: int = 0
    """Rows whose loss is not finite: gaps in the curves."""
    repeated_rows: int = 0
    """Rows that were left out, because a later one is of the same step."""

    @property
    def last_step(self) -> int:
        """The last step of which there is any record; 0 for an empty run."""
        return int(max((curve.steps[-1] for curve in (self.train, self.val) if len(curve.steps)), default=0))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and where the true mean lies with the comparison's confidence (Student's t)."""

    mean: float
    low: float | None
    """None for one value alone."""
    high: float | None
    std: float | None
    """Of the values, with n - 1."""
    count: int


@dataclass(frozen=True)
class Reach:
    """When the runs of an entry first came to the target; in the order of its runs, None for a miss."""

    steps: tuple[int | None, ...]
    tokens: tuple[int | None, ...]
    seconds: tuple[float | None, ...]

    @property
    def misses(self) -> int:
        """How many never came to it."""
        return self.steps.count(None)


@dataclass(frozen=True)
class Entry:
    """The runs that differ in their seeds alone."""

    label: str
    """Short, and no other entry's: the optimizer, and the settings in which the entries differ."""
    optimizer: str
    family: str
    """Common to the entries that differ in the learning rate alone: their label without it."""
    lr: float
    runs: tuple[Run, ...]
    final: Interval | None
    """Of the final validation losses of the finished runs; None where there is none."""
    final_train: Interval | None
    """Of their final training losses."""
    train: Band | None
    val: Band | None
    reach: Reach | None
    """None without a target."""
    step_ms: float | None
    """Median of the runs' medians."""
    optimizer_ms: float | None
    state_bytes: int | None

    @property
    def diverged(self) -> int:
        """How many of its runs diverged."""
        return sum(run.state == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Verdict:
    """Whether the first of two entries ends lower than the second."""

    first: str
    second: str
    outcome: Outcome
    difference: Interval | None
    """First minus second, mean and Welch's interval (`std` is None, `count` the smaller number of seeds)."""
    p: float | None
    """Of Welch's test, after Holm's correction over all pairs; None where there are too few seeds."""


@dataclass(frozen=True)
class Target:
    """A validation loss to come to."""

    loss: float
    origin: str
    """Who set it, in words."""


@dataclass(frozen=True)
class SensitivityPoint:
    """What became of the runs with one learning rate."""

    lr: float
    losses: tuple[float, ...]
    """Final validation losses of the finished ones."""
    diverged: int
    unfinished: tuple[float, ...]
    """Best validation losses of those that were stopped or pruned."""


@dataclass(frozen=True)
class Sensitivity:
    """A family of entries over learning rates, ascending."""

    family: str
    optimizer: str
    points: tuple[SensitivityPoint, ...]


@dataclass(frozen=True)
class SettingEffect:
    """Contenders that differ in one number of their settings, and in the learning rate, which was chosen for each."""

    setting: str
    """Its dotted key."""
    label: str
    """What they have in common: their label without the setting."""
    values: tuple[float, ...]
    """Ascending."""
    entries: tuple[Entry, ...]
    """One for each value."""


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown."""

    task: str
    unit: str
    """tokens or images"""
    entries: tuple[Entry, ...]
    """By final loss, ascending; then those without one. Trials are in the sensitivities alone."""
    contenders: tuple[Entry, ...]
    """One entry a family, the one that stands for it, in the same order: figures and verdicts are of these."""
    verdicts: tuple[Verdict, ...]
    """Every pair of contenders that have a final loss."""
    rule: str
    """How verdicts are made, in a sentence or two."""
    confidence: float
    target: Target | None
    sensitivities: tuple[Sensitivity, ...]
    """Of families with two learning rates or more."""
    setting_effects: tuple[SettingEffect, ...]
    """Of the numbers in which contenders differ."""
    cautions: tuple[str, ...]
    """Why the runs, or some of them, may not be comparable; a sentence each."""
