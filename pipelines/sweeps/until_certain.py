"""Add seeds to the contenders of undecided pairs, until all pairs are decided or all seeds are trained."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.analysis.comparison.read_runs import read_run
from pipelines.analysis.comparison.results import Verdict
from pipelines.analysis.comparison.sequential import Results
from pipelines.analysis.comparison.settings import LR, identity, settings_in
from pipelines.analysis.comparison.t_tests import interval
from pipelines.analysis.comparison.until_certain import Look, Member, Record, read_record, require_unchanged
from pipelines.analysis.comparison.verdicts import Side, judge, pairs_of
from pipelines.errors import AsgoError, UsageError
from pipelines.sweeps.definition import Sweep, SweepRun
from pipelines.sweeps.queue import Ending
from pipelines.sweeps.status import RunStatus, run_status
from pipelines.tasks.metric import Metric
from pipelines.training.metrics import Row
from pipelines.training.run_folder import RunFolder

CONFIDENCE = 0.95
FIRST, MOST = 3, 8
"""Default numbers of seeds before the first look, and at most."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of a sweep until certain."""

    first: tuple[int, ...]
    """Before the first look."""
    all: tuple[int, ...]
    """These, and those that may follow."""


@dataclass(frozen=True)
class SeedWish:
    """Options of the command line about seeds."""

    first: Sequence[int]
    """The sweep's if empty."""
    most: int | None
    against: str | None

    def seeds(self, sweep: Sweep) -> Seeds:
        """Return the seeds: those given, or 1, 2, 3, and the next numbers, without the seed of a search.

        Raises `UsageError` if there are too few or too many.
        """
        given, most = tuple(self.first) or sweep.seeds, self.most or MOST
        searched = None if sweep.search is None else sweep.search.seed
        following = (seed for seed in itertools.count(max(given, default=0) + 1) if seed != searched)
        first = given or tuple(itertools.islice(following, FIRST))
        if not 2 <= len(first) <= most:
            raise UsageError(
                f"until certain: before the first look, the number of seeds is {len(first)}, and at most it is {most}: "
                "give two seeds or more, and --max-seeds (in a claim, max_seeds) not below their number"
            )
        return Seeds(first, (*first, *itertools.islice(following, most - len(first))))


def require_same_record(record: Record, folder: Path, *, before_search: bool = False) -> None:
    """Raise `UsageError` if the folder has the record of another sweep until certain.

    `before_search`: the contenders are not compared, as those of which all trials diverge are left out later.
    """
    there = read_record(folder) or record
    changed = there.differences(record.model_copy(update={"contenders": there.contenders}) if before_search else record)
    if changed:
        lines = (f"{folder}: a sweep until certain began here with {line}; choose another --out" for line in changed)
        raise UsageError("\n".join(lines))


def require_recorded_seeds(runs: Iterable[tuple[str, int]], folder: Path) -> None:
    """Raise `UsageError` if runs, each a contender and a seed, are not in the record of a sweep until certain there.

    The sequential test would leave such runs out.
    """
    record = read_record(folder)
    if record is None:
        return
    others = [f"{name}-s{seed}" for name, seed in runs if name in record.contenders and seed not in record.seeds]
    if others:
        seeds = ", ".join(map(str, record.seeds))
        raise UsageError(
            f"{folder}: seeds were added here until certain, and the tests leave out seeds other than {seeds}: "
            f"{', '.join(others)}; give --until-certain (in a claim, until_certain = true), or choose another --out"
        )


@dataclass(frozen=True)
class Plan:
    """Contenders, and all runs that may be trained."""

    record: Record
    runs: Mapping[str, tuple[SweepRun, ...]]
    """Of each contender, in the order of the seeds."""
    metric: Metric

    @property
    def first_runs(self) -> list[SweepRun]:
        """The runs before the first look, the first seed of all contenders before the second of any."""
        return [runs[index] for index in range(self.record.first_look) for runs in self.runs.values()]


def plan_runs(runs: Sequence[SweepRun], seeds: Seeds, metric: Metric, against: str | None) -> Plan:
    """Check the contenders; `runs` are those of all seeds, in their order. Raises `UsageError`."""
    by_contender: dict[str, list[SweepRun]] = defaultdict(list)
    for run in runs:
        by_contender[run.variant].append(run)
    names = list(by_contender)
    if len(names) < 2:
        raise UsageError("--until-certain compares contenders, and there is only one: add another run")
    if against is not None and against not in names:
        raise UsageError(f"--against {against}: no contender has this name; choose one of {', '.join(names)}")
    families: dict[str, str] = {}
    for name, (run, *_) in by_contender.items():
        settings = {key: value for key, value in settings_in(run.config).items() if key != LR}
        other = families.setdefault(identity({**settings, "folder": run.config.data.folder}), name)
        if other != name:
            raise UsageError(
                f"{other} and {name} differ at most in the learning rate, so they are one contender: choose the rate "
                "with [search], then --until-certain compares the best ones"
            )
    record = Record(
        contenders=tuple(names),
        against=against,
        metric=metric.name,
        confidence=CONFIDENCE,
        first_look=len(seeds.first),
        seeds=seeds.all,
    )
    return Plan(record, {name: tuple(runs) for name, runs in by_contender.items()}, metric)


@dataclass(frozen=True)
class Standing:
    """What is known after the looks so far."""

    looks: tuple[Look, ...]
    results: Mapping[str, Results]
    """What the last look has seen; without results before the first."""
    verdicts: tuple[Verdict, ...]
    """Of the last look; none before the first."""
    missing: tuple[SweepRun, ...]
    """Runs before the next look; none after the last one."""


def standing_of(plan: Plan, results: Mapping[str, Results]) -> Standing:
    """Return the standing: a pure function of the results, so a resumed sweep decides as an uninterrupted one.

    Contenders of undecided pairs get the next seed, unless a run of either has diverged: such pairs stay as they are.
    """
    record, growing = plan.record, list(plan.record.contenders)
    standing = Standing((), {name: {} for name in growing}, (), ())
    for count in range(record.first_look, len(record.seeds) + 1):
        seeds = record.seeds[:count]
        missing = [
            plan.runs[name][index] for index in range(count) for name in growing if seeds[index] not in results[name]
        ]
        if missing:
            return replace(standing, missing=tuple(missing))
        seen = {**standing.results, **{name: {seed: results[name][seed] for seed in seeds} for name in growing}}
        verdicts = _verdicts(plan, seen)
        undecided = tuple((each.first, each.second) for each in verdicts if each.outcome == "cannot tell")
        standing = Standing((*standing.looks, Look(seeds=count, undecided=undecided)), seen, verdicts, ())
        diverged = {name for name in seen if None in seen[name].values()}
        open_pairs = [pair for pair in undecided if diverged.isdisjoint(pair)]
        growing = [name for name in record.contenders if any(name in pair for pair in open_pairs)]
        if not growing:
            break
    return standing


def _verdicts(plan: Plan, results: Mapping[str, Results]) -> tuple[Verdict, ...]:
    """Return the verdicts of `asgo compare` on these results, the best contender first."""
    sides = []
    for name, own in results.items():
        finished = {seed: value for seed, value in own.items() if value is not None}
        final = interval(list(finished.values()), plan.record.confidence)
        if final is not None:
            member = Member(Path(), plan.record, name, own)
            sides.append(Side(name, final, tuple(finished.values()), tuple(finished), "", member))
    sides.sort(key=lambda side: plan.metric.sign * side.final.mean)
    against = plan.record.against
    if against is not None and all(side.label != against for side in sides):
        return ()
    return judge(pairs_of(sides, against), plan.record.confidence, plan.metric)


class UntilCertain:
    """`Source` of the runs that looks ask for. A run that fails ends it, after the other runs of the same look."""

    waiting = None

    def __init__(self, plan: Plan, out: Path, report: Callable[[Standing], None]) -> None:
        """Raises `UsageError` if the folder has the record of another sweep. `report` is called after each look."""
        self._plan = plan
        self._out = out
        self._report = report
        self._record = read_record(out) or plan.record
        self._results: dict[str, dict[int, float | None]] = {name: {} for name in plan.runs}
        self._left: list[SweepRun] = []
        self._training: set[str] = set()
        self._ended: set[str] = set()
        self._failed = False
        require_same_record(plan.record, out)

    def look(self) -> Standing:
        """Return the standing of the runs in the folder. Raises `AsgoError` if runs changed after a look at them."""
        for name, runs in self._plan.runs.items():
            for run in runs:
                if run.config.seed not in self._results[name]:
                    self._read(run)
        for name in self._record.results:
            require_unchanged(self._out, self._record, name, self._results.get(name, {}))
        return standing_of(self._plan, self._results)

    @property
    def trained(self) -> int:
        """Number of runs that have ended, as of the last look."""
        return sum(map(len, self._results.values()))

    def record(self, standing: Standing) -> None:
        """Write the plan, the looks, and the results that they have seen."""
        record = self._plan.record.model_copy(update={"results": standing.results, "looks": standing.looks})
        if record != self._record or not standing.looks:
            self._out.mkdir(parents=True, exist_ok=True)
            record.write(self._out)
            self._record = record

    def next(self) -> RunStatus | None:
        """Return a run before the next look; the look itself comes when all have ended."""
        if not self._left and not self._training and not self._failed:
            standing = self.look()
            self.record(standing)
            self._report(standing)
            self._left = list(standing.missing)
        if not self._left:
            return None
        run = self._left.pop(0)
        self._training.add(run.name)
        return run_status(run, self._out)

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """Never stop a run early."""
        return False

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """A divergence is a result: its contender gets no further seeds."""
        self._training.discard(run.run.name)
        divergence = RunFolder(run.folder).divergence()
        if ending.kind == "failed" and divergence is not None:
            return Ending("done", f"diverged at step {divergence.step}")
        if ending.kind == "done":
            self._ended.add(run.run.name)
        self._failed = self._failed or ending.kind != "done"
        return ending

    def _read(self, run: SweepRun) -> None:
        """Store the result of a run that has ended."""
        status, seed = run_status(run, self._out), run.config.seed
        if status.state == "done":
            read = read_run(run.name, status.folder, self._plan.metric.name)
            if read.state in ("finished", "diverged"):
                self._results[run.variant][seed] = read.final
            elif run.name in self._ended:  # else it was killed before the last validation, and resumes there
                raise AsgoError(f"{status.folder}: ended without a validation after the last step; remove it")
        elif status.begun and RunFolder(status.folder).divergence() is not None:
            self._results[run.variant][seed] = None
