"""A claim: a TOML file with a sweep, a statement about two of its contenders, and a confidence; and its verdict."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.results import Entry, Interval, TestName
from pipelines.analysis.comparison.t_tests import interval
from pipelines.analysis.comparison.until_certain import Member, members_of, read_record
from pipelines.analysis.comparison.verdicts import Side, contender_named, judge, sides_of
from pipelines.config import Settings
from pipelines.errors import AsgoError, UsageError
from pipelines.optimizers import parse_toml
from pipelines.storage import printable
from pipelines.sweeps.definition import sweep_names
from pipelines.sweeps.search_table import validation_lines
from pipelines.tasks.metric import METRICS, Metric

Answer = Literal["holds", "does not hold", "cannot tell"]

_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")
_TABLE_COLUMNS = {"run", "seed", "state"}
_MOST_BYTES = 1 << 20
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
    try:
        with path.open("rb") as file:
            values = parse_toml(file.read(_MOST_BYTES).decode("utf-8-sig"))
        claim = Claim.model_validate(values)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        lines = (line.removeprefix(".").removeprefix(": ") for line in validation_lines(error, ""))
        raise UsageError("\n".join(f"{path}: {line}" for line in lines)) from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    sweep = claim.sweep if claim.sweep is None or claim.sweep in sweep_names() else str(path.parent / claim.sweep)
    runs = tuple(str(path.parent / each) for each in claim.runs)
    return claim.model_copy(update={"sweep": sweep, "runs": runs})


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim."""

    answer: Answer
    metric: Metric
    contender: Interval | None
    """Its final validations; None if all its runs diverged."""
    reference: Interval | None
    surplus: Interval | None
    """How much better the contender is than the statement says; negative if it falls short. None without values."""
    p: float | None
    test: TestName | None
    seeds_needed: int | None
    """Seeds of each for a power of 80 %, if it cannot be told."""
    reason: str | None
    """What decided it besides a test, or prevented a test."""


def judge_claim(claim: Claim, folder: Path | None) -> Judgement:
    """Judge a claim by the runs of its sweep in `folder`, or by its `runs`.

    Raises `UsageError` if a contender is not there, or none of its runs has finished, and `AsgoError` like
    `compare_runs`.
    """
    statement = claim.statement
    if folder is None and len(claim.runs) == 1 and _is_table(Path(claim.runs[0])):
        metric = METRICS[claim.metric or "loss"]
        table = _read_table(Path(claim.runs[0]), metric)
        contender, reference = (
            table.side(name, claim.confidence) for name in (statement.contender, statement.reference)
        )
        roles = {"contender": statement.contender, "reference": statement.reference}
        diverged = [role for role, name in roles.items() if None in table.results[name].values()]
    else:
        paths = [Path(each) for each in claim.runs] if folder is None else [folder]
        comparison = compare_runs(paths, confidence=claim.confidence, metric_name=claim.metric)
        # A claim names its learning rates, so of a sweep, entries that differ only in it are all there to choose.
        metric, entries = comparison.metric, comparison.contenders if folder is None else comparison.entries
        pair = [_entry(entries, name, folder) for name in (statement.contender, statement.reference)]
        diverged = [
            name
            for name, entry in zip(("contender", "reference"), pair, strict=True)
            if any(run.state == "diverged" for run in entry.runs)
        ]
        if any(entry.final is None for entry in pair):
            return _undecided(claim, metric, pair, diverged)
        contender, reference = sides_of(pair, members_of(entries))
    return _judged(claim, metric, contender, reference, diverged)


def _undecided(claim: Claim, metric: Metric, pair: Sequence[Entry], diverged: Sequence[str]) -> Judgement:
    """Judge contenders of which one has only diverged runs. Raises `UsageError` if one has only unfinished ones."""
    names = {"contender": claim.statement.contender, "reference": claim.statement.reference}
    for (role, name), entry in zip(names.items(), pair, strict=True):
        if entry.final is None and role not in diverged:
            raise UsageError(f"{name}: none of its runs has finished")
    answer: Answer = "does not hold" if "contender" in diverged else "cannot tell"
    reason = f"a run of {names[diverged[0]]} diverged"
    return Judgement(answer, metric, pair[0].final, pair[1].final, None, None, None, None, reason)


def _judged(claim: Claim, metric: Metric, contender: Side, reference: Side, diverged: Sequence[str]) -> Judgement:
    limit = _moved(reference, claim.statement.limit(metric), claim.confidence)
    (verdict,) = judge([(contender, limit)], claim.confidence, metric)
    found = verdict.difference
    assert found is not None
    ends = [None if end is None else -metric.sign * end for end in (found.low, found.high)]
    low, high = ends if metric.sign < 0 else reversed(ends)
    answers: Mapping[str, Answer] = {"better": "holds", "worse": "does not hold", "cannot tell": "cannot tell"}
    answer, reason = answers[verdict.outcome], None
    if "contender" in diverged:
        answer, reason = "does not hold", f"a run of {claim.statement.contender} diverged"
    elif "reference" in diverged and answer == "does not hold":
        answer, reason = "cannot tell", f"a run of {claim.statement.reference} diverged"
    elif verdict.p is None:
        reason = "there is no test: it needs two seeds of each, and results that differ"
    return Judgement(
        answer=answer,
        metric=metric,
        contender=contender.final,
        reference=reference.final,
        surplus=Interval(-metric.sign * found.mean, low, high, None, found.count),
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
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return set(next(csv.reader([file.readline(1 << 16)]), [])) >= _TABLE_COLUMNS


@dataclass(frozen=True)
class _Table:
    """Runs in a table that `asgo compare` wrote."""

    path: Path
    results: Mapping[str, Mapping[int, float | None]]
    """Final values by name without the seed, and by seed; None for a run that diverged."""
    steps: Mapping[str, set[str]]

    def side(self, name: str, confidence: float) -> Side:
        """Return a contender. Raises `UsageError` if none of its runs has finished.

        Runs of one seed are taken for paired if they have equal steps: the table does not say more. The record of a
        sweep until certain in the same folder is about these runs: `asgo compare` writes both.
        """
        results = self.results.get(name, {})
        finished = {seed: value for seed, value in sorted(results.items()) if value is not None}
        final = interval(tuple(finished.values()), confidence)
        if final is None:
            known = ", ".join(name for name, values in self.results.items() if set(values.values()) != {None})
            raise UsageError(f"{name}: no finished run has this name; choose from {known or 'none'}")
        record, member = read_record(self.path.parent), None
        if record is not None and name in record.contenders:
            seen = {seed: results[seed] for seed in record.seeds if seed in results}
            member = Member(self.path.parent, record, name, seen, len(results) - len(seen))
        work = ",".join(sorted(self.steps[name]))
        return Side(name, final, tuple(finished.values()), tuple(finished), work, member)


def _read_table(path: Path, metric: Metric) -> _Table:
    results: dict[str, dict[int, float | None]] = defaultdict(dict)
    steps: dict[str, set[str]] = defaultdict(set)
    if path.stat().st_size > _MOST_TABLE_BYTES:
        raise AsgoError(f"{path}: too large for a table of runs")
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file):
                if row["state"] not in ("finished", "diverged") or not row["seed"]:
                    continue
                name = printable(row["run"]).removesuffix(f"-s{row['seed']}")
                value = float(row[f"final_{metric.name}"]) if row["state"] == "finished" else None
                if value is not None and not math.isfinite(value):
                    raise ValueError(value)
                results[name][int(row["seed"])] = value
                steps[name].add(row.get("steps") or "")
        except (ValueError, KeyError, TypeError, csv.Error):
            raise AsgoError(f"{path}: not a table of runs that asgo compare wrote") from None
    return _Table(path, results, steps)
