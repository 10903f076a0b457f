"""A claim: a TOML file with a sweep, a statement about two of its contenders, and a confidence; and its verdict."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.logs.csv_files import header, is_table_of_runs
from pipelines.analysis.comparison.results import Entry, Interval, TestName
from pipelines.analysis.comparison.sequential import Results
from pipelines.analysis.comparison.t_tests import interval
from pipelines.analysis.comparison.until_certain import Member, member_of, members_of, mixing_cautions, read_record
from pipelines.analysis.comparison.verdicts import Side, contender_named, judge, side_of
from pipelines.config import Settings
from pipelines.errors import AsgoError, UsageError
from pipelines.settings_file import read_settings
from pipelines.storage import printable
from pipelines.sweeps.definition import sweep_names
from pipelines.tasks.metric import METRICS, Metric

Answer = Literal["holds", "does not hold", "cannot tell"]

_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")
_MOST_HEADER_BYTES = 1 << 20
_MOST_TABLE_BYTES = 1 << 28


class Statement(Settings):
    """What is claimed of the final validations of two contenders."""

    contender: str
    better_than: str | None = None
    no_worse_than: str | None = None
    by: float | str = 0.0
    """`better_than`: by at least so much; `no_worse_than`: by at most so much. In the metric's unit, or "2 %"."""

    @field_validator("by", mode="before")  # before the union, whose errors are one line for each of its types
    @classmethod
    def _is_an_amount(cls, by: object) -> object:
        is_number = isinstance(by, float | int) and not isinstance(by, bool) and 0 <= by < math.inf
        if not is_number and not (isinstance(by, str) and _PERCENT.fullmatch(by)):
            raise ValueError(f'{by!r}: write a number from 0, or a percentage of the other\'s value, such as "2 %"')
        return by

    @model_validator(mode="after")
    def _has_one_relation(self) -> Self:
        if (self.better_than is None) == (self.no_worse_than is None):
            raise ValueError("write either better_than or no_worse_than")
        if self.contender == self.reference:
            raise ValueError(f"{self.contender} is compared with itself; name two runs")
        return self

    @property
    def reference(self) -> str:
        """The other contender."""
        return self.better_than or self.no_worse_than or ""

    def require_unit(self, metric: Metric) -> None:
        """Raise `UsageError` if `by` cannot be an amount of the metric."""
        if metric.is_share and not isinstance(self.by, str) and self.by > 1:
            raise UsageError(
                f"statement.by = {self.by:g}: {metric.name} is a fraction from 0 to 1; {self.by / 100:g} is "
                f"{self.by:g}{metric.difference_unit}"
            )

    def limit(self, metric: Metric) -> Callable[[float], float]:
        """Return the function from the reference's value to the value that the contender must be better than."""
        percent = _PERCENT.fullmatch(self.by) if isinstance(self.by, str) else None
        share, amount = (float(percent[1]) / 100, 0.0) if percent else (0.0, float(self.by))
        towards_better = -metric.sign if self.better_than is not None else metric.sign
        return lambda value: value + towards_better * (share * abs(value) + amount)

    def in_words(self, metric: Metric) -> str:
        """Return the statement as a sentence without its end."""
        by = self.by.strip() if isinstance(self.by, str) else metric.difference(self.by) + metric.difference_unit
        if self.better_than is not None:
            amount = f" by at least {by}" if self.by else ""
            return f"{self.contender} is better than {self.better_than} in final {metric.name}{amount}"
        amount = f" by more than {by}" if self.by else ""
        return f"{self.contender} is not worse than {self.no_worse_than} in final {metric.name}{amount}"


class Claim(Settings):
    """Content of a claim's file."""

    title: str | None = None
    sweep: str | None = None
    """A shipped sweep, or a sweep file; a relative path begins at the claim's folder."""
    runs: tuple[str, ...] = ()
    """Instead of a sweep: runs, logs, folders of them, or one table `runs.csv` of a report."""
    metric: Literal["loss", "accuracy"] | None = None
    """The task's first metric if absent."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    until_certain: bool = False
    """Whether to add seeds while the sweep's pairs with the statement's reference are undecided."""
    max_seeds: Annotated[int, Field(ge=2, le=100)] | None = None
    statement: Statement

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.sweep is None) == (not self.runs):
            raise ValueError("write either sweep or runs")
        if self.max_seeds is not None and not self.until_certain:
            raise ValueError("max_seeds is for until_certain = true")
        if self.until_certain and self.sweep is None:
            raise ValueError("until_certain needs a sweep")
        return self


def read_claim(path: Path) -> Claim:
    """Read a claim's file; its paths begin at its folder. Raises `UsageError` with one line for each problem."""
    claim = read_settings(path, Claim)
    sweep = claim.sweep if claim.sweep is None or claim.sweep in sweep_names() else str(path.parent / claim.sweep)
    runs = tuple(str(path.parent / each) for each in claim.runs)
    return claim.model_copy(update={"sweep": sweep, "runs": runs})


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim."""

    answer: Answer
    metric: Metric
    contender: Interval | None = None
    """Its final validations; None if all its runs diverged."""
    reference: Interval | None = None
    surplus: Interval | None = None
    """How much better the contender is than the statement says; negative if it falls short. None without values."""
    p: float | None = None
    test: TestName | None = None
    seeds_needed: int | None = None
    """Seeds of each for a power of 80 %, if it cannot be told."""
    reason: str | None = None
    """What decided it besides a test, or prevented a test."""
    cautions: tuple[str, ...] = ()
    """What may make the comparison of the runs unfair or wrong."""


@dataclass(frozen=True)
class _Pair:
    """The two contenders of a claim, as they were found."""

    metric: Metric
    sides: tuple[Side | None, Side | None]
    """The contender and the reference; None without a finished run."""
    diverged: tuple[bool, bool]
    """Whether a run of them diverged."""
    cautions: tuple[str, ...] = ()


def judge_claim(claim: Claim, folder: Path | None) -> Judgement:
    """Judge a claim by the runs of its sweep in `folder`, or by its `runs`.

    Raises `UsageError` if a contender is not there, none of its runs has ended, or the claim's `by` is no amount of the
    metric, and `AsgoError` like `compare_runs`.
    """
    if folder is None and len(claim.runs) == 1 and _is_table(Path(claim.runs[0])):
        pair = _pair_in_table(claim, Path(claim.runs[0]))
    else:
        pair = _pair_of_runs(claim, folder)
    claim.statement.require_unit(pair.metric)
    for name, side, diverged in zip(_names(claim), pair.sides, pair.diverged, strict=True):
        if side is None and not diverged:
            raise UsageError(f"{name}: none of its runs has finished")
    return _judged(claim, pair)


def _names(claim: Claim) -> tuple[str, str]:
    return claim.statement.contender, claim.statement.reference


def _pair_of_runs(claim: Claim, folder: Path | None) -> _Pair:
    paths = [Path(each) for each in claim.runs] if folder is None else [folder]
    comparison = compare_runs(paths, confidence=claim.confidence, metric_name=claim.metric)
    # A claim names its learning rates, so of a sweep, entries that differ only in it are all there to choose.
    entries = comparison.contenders if folder is None else comparison.entries
    members = members_of(entries)
    contender, reference = (_entry(entries, name, folder) for name in _names(claim))
    return _Pair(
        comparison.metric,
        (side_of(contender, members), side_of(reference, members)),
        (_has_diverged(contender), _has_diverged(reference)),
        comparison.cautions,
    )


def _has_diverged(entry: Entry) -> bool:
    return any(run.state == "diverged" for run in entry.runs)


def _judged(claim: Claim, pair: _Pair) -> Judgement:
    contender, reference = pair.sides
    found = Judgement(
        answer="cannot tell",
        metric=pair.metric,
        contender=None if contender is None else contender.final,
        reference=None if reference is None else reference.final,
        cautions=pair.cautions,
    )
    if contender is not None and reference is not None:
        found = _tested(claim, found, contender, reference)
    if pair.diverged[0]:
        return replace(found, answer="does not hold", reason=f"a run of {claim.statement.contender} diverged")
    if pair.diverged[1] and found.answer != "holds":
        return replace(found, answer="cannot tell", reason=f"a run of {claim.statement.reference} diverged")
    return found


def _tested(claim: Claim, found: Judgement, contender: Side, reference: Side) -> Judgement:
    """Return the judgement with the answer of the test."""
    limit = _moved(reference, claim.statement.limit(found.metric), claim.confidence)
    (verdict,) = judge([(contender, limit)], claim.confidence, found.metric)
    difference, sign = verdict.difference, -found.metric.sign
    assert difference is not None
    ends = [None if end is None else sign * end for end in (difference.low, difference.high)]
    low, high = ends if sign > 0 else reversed(ends)
    answers: Mapping[str, Answer] = {"better": "holds", "worse": "does not hold", "cannot tell": "cannot tell"}
    reason = None
    if verdict.p is None:
        gone = [f"{m.name}-s{seed}" for m in (contender.member, reference.member) if m for seed in m.missing]
        needs = f"{', '.join(gone)} missing" if gone else "it needs two seeds of each, and results that differ"
        reason = f"there is no test: {needs}"
    return replace(
        found,
        answer=answers[verdict.outcome],
        surplus=Interval(sign * difference.mean, low, high, None, difference.count),
        p=verdict.p,
        test=verdict.test,
        seeds_needed=verdict.seeds_needed,
        reason=reason,
    )


def _moved(side: Side, move: Callable[[float], float], confidence: float) -> Side:
    """Return the side with other values; a test of them is one of the statement."""
    values = tuple(map(move, side.values))
    final = interval(values, confidence)
    assert final is not None
    member = side.member
    if member is not None:
        results = {seed: None if value is None else move(value) for seed, value in member.results.items()}
        member = replace(member, results=results)
    return replace(side, label=f"limit by {side.label}", values=values, final=final, member=member)


def _entry(contenders: Sequence[Entry], name: str, folder: Path | None) -> Entry:
    """Return the contender with the runs `folder/NAME-s<seed>`; without a folder, that with this label or optimizer."""
    if folder is None:
        return contender_named(contenders, name, "contender")
    for entry in contenders:
        if any(run.path.resolve() == (folder / f"{name}-s{run.seed}").resolve() for run in entry.runs):
            return entry
    raise UsageError(f"{name}: no run of the sweep has this name")


def _is_table(path: Path) -> bool:
    """Return whether the file is a table of runs, which `asgo compare` wrote."""
    if path.suffix != ".csv" or not path.is_file():
        return False
    with path.open("rb") as file:
        return is_table_of_runs(file.read(_MOST_HEADER_BYTES))


@dataclass
class _TabledRuns:
    """Runs of one name in a table that `asgo compare` wrote."""

    results: dict[int, float | None] = field(default_factory=dict)
    """Final values by seed; None for a run that diverged."""
    steps: set[str] = field(default_factory=set)

    def side(self, name: str, confidence: float, member: Member | None) -> Side | None:
        """Return the contender; None without a finished run.

        Runs of one seed are taken for paired if they have equal steps: the table does not say more.
        """
        finished = {seed: value for seed, value in sorted(self.results.items()) if value is not None}
        final = interval(tuple(finished.values()), confidence)
        if final is None:
            return None
        return Side(name, final, tuple(finished.values()), tuple(finished), ",".join(sorted(self.steps)), member)


def _pair_in_table(claim: Claim, path: Path) -> _Pair:
    metric, runs = _read_table(path, claim.metric)
    names = _names(claim)
    for name in names:
        if name not in runs:
            raise UsageError(f"{name}: no finished run has this name; choose from {', '.join(runs) or 'none'}")
    members = {name: member for name in names if (member := _member(path, name, runs[name].results)) is not None}
    contender, reference = (runs[name].side(name, claim.confidence, members.get(name)) for name in names)
    finished = [side.label for side in (contender, reference) if side is not None]
    diverged = [None in runs[name].results.values() for name in names]
    return _Pair(metric, (contender, reference), (diverged[0], diverged[1]), tuple(mixing_cautions(finished, members)))


def _member(path: Path, name: str, results: Results) -> Member | None:
    """Return the contender in the record that `asgo compare` wrote for these runs; None without one."""
    below, _, contender = name.rpartition("/")
    record = read_record(path.parent / below)
    if record is None or contender not in record.contenders:
        return None
    return member_of(path.parent / below, record, contender, results)


def _read_table(path: Path, asked: str | None) -> tuple[Metric, dict[str, _TabledRuns]]:
    """Return the metric of a table, and its runs that have ended by their name without the seed."""
    if path.stat().st_size > _MOST_TABLE_BYTES:
        raise AsgoError(f"{path}: too large for a table of runs")
    content = path.read_bytes()
    names, delimiter = header(content)
    metric = next((metric for metric in METRICS.values() if f"final_{metric.name}" in names), None)
    if metric is not None and asked not in (None, metric.name):
        raise UsageError(f"{path}: compares by {metric.name}; for {asked}, give the runs, or a report by {asked}")
    runs: dict[str, _TabledRuns] = defaultdict(_TabledRuns)
    try:
        if metric is None:
            raise KeyError("no final value")
        for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter):
            if row["state"] not in ("finished", "diverged") or not row["seed"]:
                continue
            found = runs[printable(row["run"]).removesuffix(f"-s{row['seed']}")]
            found.steps.add(row.get("steps") or "")
            found.results[int(row["seed"])] = (
                _finite(row[f"final_{metric.name}"], delimiter) if row["state"] == "finished" else None
            )
    except (ValueError, KeyError, TypeError, csv.Error):
        raise AsgoError(f"{path}: not a table of runs that asgo compare wrote") from None
    return metric, dict(runs)


def _finite(cell: str, delimiter: str) -> float:
    """Return the number in a cell; a spreadsheet with semicolons may have written a decimal comma."""
    value = float(cell.replace(",", ".") if delimiter == ";" else cell)
    if not math.isfinite(value):
        raise ValueError(value)
    return value
