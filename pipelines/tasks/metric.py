"""Metrics of a validation by which models are judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pipelines.errors import UsageError

if TYPE_CHECKING:
    from pipelines.tasks.description import TaskDescription

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Metric:
    """A metric of a validation: which values are better, and how they are written."""

    name: str
    """Its key in a row of metrics, and in the names of CSV columns and JSON keys."""
    plural: str
    sign: Literal[1, -1]
    """`sign * value` is a cost: the lower, the better."""
    head: str
    """Head of its column where another metric is compared."""
    is_share: bool = False
    """Whether it is a fraction from 0 to 1, written as a percentage; differences in percentage points."""

    def either(self, if_lower: _Value, if_higher: _Value) -> _Value:
        """Return the first if lower values are better, the second if higher values are."""
        return if_lower if self.sign > 0 else if_higher

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best value; None without values."""
        return min(values, key=lambda value: self.sign * value, default=None)

    @property
    def other(self) -> Metric:
        """The metric that stands beside this one."""
        return next(metric for metric in METRICS.values() if metric is not self)

    @property
    def format(self) -> str:
        """Format of a value, for Python and for d3."""
        return ".2%" if self.is_share else ".4f"

    def text(self, value: float | None) -> str:
        """Format a value; "" for None."""
        return "" if value is None else f"{value:{self.format}}"

    def text_beside(self, value: float | None) -> str:
        """Format a value for a column beside the compared metric: a percentage with one decimal."""
        return f"{value:.1%}" if self.is_share and value is not None else self.text(value)

    def difference(self, value: float, sign: str = "") -> str:
        """Format a difference of two values, without `difference_unit`."""
        return f"{100 * value:{sign}.2f}" if self.is_share else f"{value:{sign}.4f}"

    @property
    def difference_unit(self) -> str:
        """Unit after a difference, with a space."""
        return " points" if self.is_share else ""


LOSS = Metric("loss", "losses", 1, "loss")
ACCURACY = Metric("accuracy", "accuracies", -1, "top-1", is_share=True)
BPB = Metric("bpb", "bits per byte", 1, "bpb")
"""No task records it, but logs of other programs do: it does not depend on the tokenizer, as a loss per token does."""
METRICS = {metric.name: metric for metric in (LOSS, ACCURACY, BPB)}
"""Metrics by name."""


def choose_metric(task: TaskDescription, asked: str | None, option: str) -> Metric:
    """Return the task's metric of the name `asked`; its first metric for None.

    Raises `UsageError`, which names the `option`, if the task does not record this metric.
    """
    for metric in task.metrics:
        if asked in (None, metric.name):
            return metric
    known = " or ".join(metric.name for metric in task.metrics)
    raise UsageError(f"{option} {asked}: the task {task.name} records no {asked}; choose {known}")
