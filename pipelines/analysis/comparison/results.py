"""Results of a comparison: plain values from which figures, tables and the page are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.analysis.comparison.rules import EvidenceRule
from pipelines.config import RunConfig
from pipelines.tasks.metric import Metric
from pipelines.training.lineage import Ancestor

Array = npt.NDArray[np.float64]

State = Literal["finished", "unfinished", "diverged", "empty"]
"""finished: validated after the last step; unfinished: stopped, or still training; diverged: a loss that is not finite,
or not below the untrained model's; empty: nothing recorded yet."""

Outcome = Literal["better", "worse", "cannot tell"]
TestName = Literal["paired", "Welch", "sequential"]


@dataclass(frozen=True)
class Curve:
    """The compared metric of one split, ascending in steps; four arrays of equal length.

    Losses are in nats per token (or image), accuracies are fractions.
    """

    steps: Array
    tokens: Array
    """Images, if the run trains on images. NaN if they are not recorded."""
    seconds: Array
    """Time of training steps, without validation and saving. NaN if it is not recorded."""
    values: Array

    def since(self, step: int) -> Curve:
        """Return the part from the last point at or before a step."""
        begin = max(0, int(np.searchsorted(self.steps, step, side="right")) - 1)
        return Curve(self.steps[begin:], self.tokens[begin:], self.seconds[begin:], self.values[begin:])


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value over seeds, at their common steps."""

    steps: Array
    tokens: Array
    seconds: Array
    """Mean over the seeds."""
    mean: Array
    lowest: Array
    highest: Array


@dataclass(frozen=True)
class Run:
    """A run folder, or a run of a log of another program; curves and results are those of the compared metric."""

    name: str
    """Its path relative to the common folder of all compared runs."""
    path: Path
    config: RunConfig | None
    """None for a run of a log, which does not say it."""
    metric: Metric
    """The compared metric."""
    optimizer: str
    """For a run of a log, the contender that the log, or its name, names."""
    lr: float | None
    seed: int | None
    """None if neither the log nor its name says it."""
    steps: int | None
    """Length of the whole run; None if the log does not say it."""
    data: Mapping[str, str]
    """The data's description in `config.json`."""
    environment: Mapping[str, str]
    """Where `config.json` says it: `device`, `instructions` of the CPU, version of `torch`, `git_commit`."""
    state: State
    is_trial: bool
    """Whether it is a trial of a search: it shows the effect of a learning rate, but is not a result."""
    train: Curve
    """Thinned for display, with all spikes."""
    smoothed: Curve
    """Moving mean of the training values, at the same steps for all runs of an entry."""
    val: Curve
    """Every validation."""
    final: float | None
    """Validation after the last step, or the last one of a log; None unless finished."""
    final_train: float | None
    """Mean training value over the last 2 % of the steps; None unless finished."""
    best: float | None
    """Best validation in any state; None without validation."""
    beside: float | None
    """The metric that is not compared, at the last validation; None if not recorded."""
    step_ms: float | None
    """Median over the recorded training steps."""
    optimizer_ms: float | None
    """Median time of the optimizer in a step."""
    state_bytes: int | None
    """Bytes of the optimizer's tensors in the newest checkpoint; None without one."""
    reason: str | None
    """Why it is not finished, in a few words; None if it is."""
    lost_rows: int = 0
    """Rows whose value is not finite: gaps in the curves."""
    repeated_rows: int = 0
    """Rows left out because a later row has the same step."""
    lineage: tuple[Ancestor, ...] = ()
    """The checkpoints that it descends from, oldest first; none unless it is a branch. Its metrics include theirs."""
    optimizer_sha256: str = ""
    """First digits of the SHA-256 of an imported optimizer's code."""
    drawn_from: int = 0
    """First step of its curves in figures: the curve of another run shows those before."""

    @property
    def name_in_sweep(self) -> str | None:
        """Name of its folder, links resolved, without `-s` and the seed, as a sweep names it; None for other names."""
        name, suffix = self.path.resolve().name, f"-s{self.seed}"
        return name.removesuffix(suffix) if name.endswith(suffix) else None

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 for an empty run."""
        return int(self.spent("steps"))

    def spent(self, unit: Literal["steps", "tokens", "seconds"]) -> float:
        """Return what it took until the last record; 0 for an empty run."""
        curves = (curve for curve in (self.train, self.val) if len(curve.steps))
        return max((float(getattr(curve, unit)[-1]) for curve in curves), default=0.0)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its confidence interval (Student's t)."""

    mean: float
    low: float | None
    """None for a single value."""
    high: float | None
    std: float | None
    """Standard deviation of the values, with n - 1."""
    count: int


@dataclass(frozen=True)
class Reach:
    """When the runs of an entry first reached the target, in the order of its runs; None for a miss."""

    steps: tuple[int | None, ...]
    tokens: tuple[int | None, ...]
    """None, too, if it is not recorded; so with the seconds."""
    seconds: tuple[float | None, ...]

    @property
    def misses(self) -> int:
        """Number of runs that never reached it."""
        return self.steps.count(None)


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in the seed."""

    label: str
    """Short and unique: the optimizer, and the settings in which the entries differ."""
    optimizer: str
    family: str
    """Label of the entries that differ only in the learning rate, without the learning rate."""
    lr: float | None
    """None for runs of logs."""
    runs: tuple[Run, ...]
    """By seed."""
    final: Interval | None
    """Interval of the finished runs' final validations; None without finished runs."""
    final_train: Interval | None
    """Interval of their final training values."""
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
        """Number of its runs that diverged."""
        return sum(run.state == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Verdict:
    """Whether the first of two entries ends better than the second."""

    first: str
    second: str
    outcome: Outcome
    difference: Interval | None
    """First minus second, mean and the test's interval (`std` is None, `count` the smaller number of seeds)."""
    p: float | None
    """p-value of the t-test after Holm's correction over all tested pairs; None without a test."""
    test: TestName | None = None
    """None with too few seeds, or without variance."""
    corrected: tuple[float, float] | None = None
    """Ends of the difference's interval at the level of Holm's procedure: without 0 only if the outcome is certain."""
    seeds_needed: int | None = None
    """How many seeds each would need in total to tell; see `t_tests.seeds_needed`. None if the outcome is certain, and
    for a sequential test, whose number of seeds is limited from the beginning."""


@dataclass(frozen=True)
class Target:
    """A validation loss, or accuracy, to reach."""

    value: float
    origin: str
    """Where it is from, as text."""


@dataclass(frozen=True)
class SensitivityPoint:
    """Results of the runs with one learning rate."""

    lr: float
    values: tuple[float, ...]
    """Final validations of the finished runs."""
    diverged: int
    unfinished: tuple[float, ...]
    """Best validations of runs that were stopped or pruned."""


@dataclass(frozen=True)
class Sensitivity:
    """A family of entries over learning rates, ascending."""

    family: str
    optimizer: str
    points: tuple[SensitivityPoint, ...]
    searched: str | None = None
    """Contender of a search, if all runs are its trials."""


@dataclass(frozen=True)
class SettingEffect:
    """Contenders that differ in one numeric setting, and in the learning rate, which was chosen for each."""

    setting: str
    """Its dotted key."""
    label: str
    """What they have in common: their label without the setting."""
    values: tuple[float, ...]
    """Ascending."""
    entries: tuple[Entry, ...]
    """One for each value."""


@dataclass(frozen=True)
class Tuning:
    """The best result of k trials of a contender of a search, for k = 1, 2, ..., n; see `tuning`."""

    label: str
    """That of its final runs' entry, or else the contender's name."""
    optimizer: str
    entry: Entry | None
    """Entry of its final runs, if they are compared."""
    trials: tuple[Run, ...]
    """All that began, in the order in which they were tried."""
    counted: int
    """n: without those that may still be running."""
    is_expected: bool
    """Whether the best is the mean over random orders of the trials; else it is that of the first k."""
    best: Array
    band: Array | None
    """Ends of the bootstrap interval, as two rows; None unless it is expected."""
    tokens: Array
    """Spent on k trials."""

    def whole_trial(self, unit: Literal["steps", "tokens"]) -> float:
        """Return the length of the longest trial."""
        return max(run.spent(unit) for run in self.trials)

    def total(self, unit: Literal["tokens", "seconds"]) -> float:
        """Return what all trials took."""
        return sum(run.spent(unit) for run in self.trials)


@dataclass(frozen=True)
class Evidence:
    """Whether the runs of a contender meet an evidence rule."""

    entry: Entry
    margin: float | None
    """`(target - mean final loss) * sqrt(n)`; None without finished runs."""
    is_met: bool
    """Whether it is large enough, leaving the objections aside."""
    runs_needed: int | None
    """Number of runs that would meet the rule with this mean; None if no number does."""
    objections: tuple[str, ...]
    """Why the runs do not qualify."""
    doubts: tuple[str, ...]
    """Why they may not, which only their author knows."""

    @property
    def outcome(self) -> Literal["met", "not met", "does not qualify"]:
        """The result."""
        return "does not qualify" if self.objections else "met" if self.is_met else "not met"


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison."""

    task: str | None
    """None if all runs are read from logs."""
    unit: str
    """tokens or images"""
    metric: Metric
    """By which runs are compared."""
    entries: tuple[Entry, ...]
    """Sorted by the final metric, the best first, then entries without one. Trials are only in the sensitivities."""
    contenders: tuple[Entry, ...]
    """The representative entry of each family, in the same order. Figures and verdicts are about these."""
    verdicts: tuple[Verdict, ...]
    """One verdict per tested pair of contenders with a finished run."""
    rule: str
    """How verdicts are made, in a sentence or two."""
    confidence: float
    target: Target | None
    sensitivities: tuple[Sensitivity, ...]
    """Sensitivities of families with two or more learning rates."""
    setting_effects: tuple[SettingEffect, ...]
    """Effects of the numeric settings in which contenders differ."""
    cautions: tuple[str, ...]
    """Sentences that say why runs may not be comparable, or do not qualify for the evidence rule."""
    tunings: tuple[Tuning, ...] = ()
    """Tuning of each contender of a search."""
    against: Entry | None = None
    """The contender that all others are tested against; None if all pairs are tested."""
    evidence_rule: EvidenceRule | None = None
    evidence: tuple[Evidence, ...] = ()
    """The evidence of each contender, in their order; none without a rule."""
