"""A search: trials of every contender, then final runs with its best settings."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import math
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.analysis.comparison.until_certain import read_record
from pipelines.config import differences, flatten, load_run_config
from pipelines.errors import AsgoError, UsageError
from pipelines.optimizers import short_key
from pipelines.storage import write_atomically
from pipelines.sweeps.contenders import Contender, SearchPlan
from pipelines.sweeps.definition import SweepRun
from pipelines.sweeps.grid import Position, edge_axes, next_position
from pipelines.sweeps.queue import Ending, queue_folder
from pipelines.sweeps.search_table import Around, Range
from pipelines.sweeps.status import RunStatus, run_status
from pipelines.sweeps.study import (
    Claims,
    Space,
    Worker,
    between,
    make_pruner,
    make_sampler,
    one_of,
    open_storage,
    require_sampler,
)
from pipelines.sweeps.unit_cube import quasi_random
from pipelines.tasks.metric import LOSS, Metric
from pipelines.training.metrics import Row
from pipelines.training.run_folder import SEARCH_RECORD, SUPERSEDED, TRIALS, RunFolder

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

_JOURNAL = "study.log"
_ASK_AGAIN_S = 1.0


def open_search(plan: SearchPlan, out: Path, worker: int | None = None) -> SearchRuns:
    """Join the search in its storage. Raises `UsageError` if the storage has another search, or cannot be opened."""
    require_sampler(plan.search.sampler)
    runs = SearchRuns(plan, open_storage(plan.search.storage, out / TRIALS / _JOURNAL), out, worker)
    runs.agree()
    return runs


def is_begun(out: Path) -> bool:
    """Whether a search was begun in this folder."""
    return (out / TRIALS / SEARCH_RECORD).is_file()


def record_search(plan: SearchPlan, out: Path) -> None:
    """Write a description of the search next to its trials, without the storage: its URL may hold a password."""
    record = {
        "sweep": plan.name,
        **plan.search.model_dump(mode="json", exclude={"storage"}),
        "contenders": [contender.name for contender in plan.contenders],
        "seeds": plan.seeds,
    }
    (out / TRIALS).mkdir(parents=True, exist_ok=True)
    write_atomically(out / TRIALS / SEARCH_RECORD, (json.dumps(record, indent=1) + "\n").encode())


class ContenderTrials:
    """The trials of one contender, of all workers."""

    def __init__(self, contender: Contender, name: str, storage: BaseStorage, metric: Metric) -> None:
        self.contender = contender
        self.search = contender.search
        self.metric = metric
        config = contender.own_trial.config
        pruner = make_pruner(self.search.pruner, config.evaluation.every, config.training.steps)
        self.claims = Claims(storage, name, self.search.trials, pruner, metric)

    @property
    def first_trials(self) -> int:
        """Number of trials with which the search was begun."""
        trials: int = self.claims.definition["search"]["trials"]
        return trials

    @property
    def stored_trials(self) -> int:
        """Number of trials of the stored search."""
        return self.claims.extended or self.first_trials

    @property
    def is_extended(self) -> bool:
        """Whether the search was begun with fewer trials."""
        return self.search.trials > self.first_trials

    def agree(self) -> tuple[list[str], list[str]]:
        """Store the search's definition; returns a line for each difference from a stored one, but for more trials.

        First the lines about the table [search], which all contenders share, then those about this contender.
        """
        search = self.search.model_dump(mode="json", exclude={"storage"})
        if self.claims.definition is None:
            self.claims.define({"search": search, "config": self.contender.config.model_dump(mode="json")})
        saved = self.claims.definition
        try:
            changed = differences(load_run_config(saved["config"]), self.contender.config)
        except ValidationError:
            changed = ["a version of asgo with other settings began it"]
        old = flatten({"metric": LOSS.name, **saved["search"]})  # the first version knew only the loss
        new = flatten(search)
        lines = [
            f"{key} is {old.get(key)} there, {new.get(key)} now"
            for key in {**old, **new}
            if old.get(key) != new.get(key) and key != "trials"
        ]
        return lines, changed

    def extend(self) -> None:
        """Store the number of trials, if it is larger than the stored one."""
        if self.search.trials > self.stored_trials:
            self.claims.extend(self.search.trials)

    def claim(self, worker: Worker) -> FrozenTrial | None:
        """Claim a trial for this worker; None if all are claimed."""
        while len(held := self.claims.held()) < self.search.trials:
            choice, params = self._choose(held)
            trial = self.claims.add(worker, choice, params, self.space if params else {})
            if trial is not None:
                return trial
        return None

    def _choose(self, held: Sequence[FrozenTrial]) -> tuple[Any, dict[str, Any]]:
        """Return what identifies the next trial, and its settings; without both, if the sampler draws them later."""
        if self.search.sampler == "grid":
            position = next_position(self.contender.points, self._costs(held))
            return position[0] if len(position) == 1 else list(position), self.contender.at(position)
        if self.search.sampler == "qmc":  # the claim is of a point, so that no point is left out or taken twice
            return len(held), quasi_random(self.search.seed, len(held), self.space)
        return None, {}

    def run(self, trial: FrozenTrial) -> SweepRun:
        """Return the run of a claimed trial."""
        settings = trial.params
        if self.search.sampler not in ("grid", "qmc"):
            sampler = make_sampler(self.search.sampler, self.search.seed, trial.number)
            settings = self.claims.sample(trial.number, self.space, sampler)
        return self.contender.trial(trial.number, settings)

    @cached_property
    def space(self) -> Space:
        """The search space, for optuna."""
        space = {}
        for key, dimension in self.search.space.items():
            own = self.contender.own[key]
            if isinstance(dimension, Around):
                beyond = self.search.trials if self.search.sampler == "grid" else 0
                space[key] = between(*dimension.ends(own, beyond), log=True)
            elif isinstance(dimension, Range):
                number = float if isinstance(own, float) else lambda end: end
                space[key] = between(number(dimension.low), number(dimension.high), log=dimension.log)
            else:
                space[key] = one_of(dimension)
        return space

    def result(self) -> SearchResult:
        """Return the results of the trials so far."""
        held = self.claims.held()
        done = [trial for trial in held if trial.state.is_finished()]
        best, first_best = self._best(held), self._best(held[: self.first_trials])
        return SearchResult(
            self.contender,
            trials=len(done),
            pruned=sum(trial.state.name == "PRUNED" for trial in done),
            diverged=sum(trial.value is not None and math.isinf(trial.value) for trial in done),
            settings=None if best is None else best.params,
            value=None if best is None else best.value,
            on_edge=() if best is None or self.search.sampler != "grid" else self._on_edge(held),
            mark="" if best is first_best or best is None else f" t{best.number}",
        )

    def superseded(self, out: Path) -> dict[Path, int]:
        """Return the final runs whose settings are no longer the best in an extended search, each with its trial."""
        held = self.claims.held() if self.is_extended else []
        best = self._best(held)
        former = [trial for trial in held if best is not None and trial.params != best.params]
        found = {}
        for path in out.glob(f"{glob.escape(self.contender.name)}-s*") if former else ():
            with contextlib.suppress(AsgoError):  # not a run; whoever needs the folder reports it
                config = RunFolder(path).config()
                for trial in former:
                    final = self.contender.final(trial.params, config.seed)
                    if path.name == final.name and not differences(config, final.config):
                        found[path] = trial.number
        return found

    def _best(self, held: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """Return the finished trial with the lowest cost; of equal ones the first. None if no cost is finite."""
        finite = [trial for trial in held if math.isfinite(self._cost(trial))]
        return min(finite, key=lambda trial: (self._cost(trial), trial.number), default=None)

    def _on_edge(self, held: Sequence[FrozenTrial]) -> tuple[str, ...]:
        keys = list(self.search.rows)
        return tuple(keys[axis] for axis in edge_axes(self._costs(held)))

    def _costs(self, held: Sequence[FrozenTrial]) -> dict[Position, float]:
        """Return costs by position of the grid."""
        choices = [trial.user_attrs["choice"] for trial in held]
        positions = [tuple(choice) if isinstance(choice, list) else (choice,) for choice in choices]
        return {position: self._cost(trial) for position, trial in zip(positions, held, strict=True)}

    def _cost(self, trial: FrozenTrial) -> float:
        """Return what the search minimizes; infinity for an unfinished, pruned or diverged trial."""
        if trial.state.name != "COMPLETE":
            return math.inf
        assert trial.value is not None
        return self.metric.sign * trial.value


@dataclass(frozen=True)
class SearchResult:
    """Results of a contender's trials."""

    contender: Contender
    trials: int
    """Finished trials, including pruned and diverged ones."""
    pruned: int
    diverged: int
    settings: dict[str, Any] | None
    """Best settings; None if no trial has a finite value."""
    value: float | None
    """Their final value of the metric."""
    on_edge: tuple[str, ...]
    """Settings of a grid whose best value is the lowest or highest tried one."""
    mark: str
    """Distinguishes the final runs from those of the best settings before the search was extended."""

    @property
    def complete(self) -> bool:
        """Whether all trials are finished."""
        return self.trials == self.contender.search.trials

    def finals(self, seeds: Sequence[int]) -> dict[str, SweepRun]:
        """Return the final runs with the best settings so far, by their claims."""
        if self.settings is None:
            return {}
        runs = [self.contender.final(self.settings, seed) for seed in seeds]
        return {run.name + self.mark: run for run in runs}


@dataclass(frozen=True)
class Elsewhere:
    """An unfinished run of another worker."""

    name: str
    is_trial: bool
    place: str
    left: str | None
    """Why it stopped; None if it runs, or was killed."""


@dataclass(frozen=True)
class _Claimed:
    claims: Claims
    number: int
    trials: ContenderTrials | None
    """None for a final run."""


class SearchRuns:
    """`Source` of a search's runs: claims them one by one in the storage that all workers share.

    First come unfinished runs of this folder's worker. Then trials, of the contender with the fewest claims. Last, the
    final runs of contenders whose trials have all ended.
    """

    waiting: str | None = None

    def __init__(self, plan: SearchPlan, storage: BaseStorage, out: Path, worker: int | None = None) -> None:
        self._plan = plan
        self._out = out
        self._number = worker
        self._contenders = [
            ContenderTrials(contender, f"{plan.name}/{contender.name}", storage, plan.metric)
            for contender in plan.contenders
        ]
        # No contender's study has this name.
        self._finals = Claims(storage, f"{plan.name}: final runs", metric=plan.metric)
        self._claimed: dict[str, _Claimed] = {}
        """Every run that this process has started, by name."""
        self._failed: set[str] = set()
        """Contenders with a failed trial. Later trials may depend on it, so they wait for the next command."""
        self._pruned: set[str] = set()
        self._tidy: set[str] = set()
        """Contenders without superseded final runs in this folder."""
        self._searched_s = -math.inf
        """Time of the last search for a run that found none."""

    def agree(self) -> None:
        """Raise `UsageError` if the storage has another search of this name, or this one with more trials, or if more
        trials would follow a sweep until certain.
        """
        found = [(trials.contender.name, *trials.agree()) for trials in self._contenders]
        shared = dict.fromkeys(line for _, lines, _ in found for line in lines)
        lines = [*shared, *(f"{name}: {line}" for name, _, lines in found for line in lines)]
        if lines:
            place = (
                "choose another --out" if self._plan.search.storage is None else "give the sweep's file another name"
            )
            raise UsageError(
                "\n".join(
                    f"search {self._plan.name} differs from the one begun here: {line}; {place}" for line in lines
                )
            )
        stored, asked = max(trials.stored_trials for trials in self._contenders), self._plan.search.trials
        if stored > asked:
            raise UsageError(
                f"search {self._plan.name} already has trials = {stored}, not {asked}: trials that were begun count;"
                f" write trials = {stored} or more"
            )
        record = read_record(self._out) if asked > stored else None
        if record is not None and record.looks:  # results that were seen may be why, and a new best would replace them
            raise UsageError(
                f"{self._out}: final runs of {stored} trials were compared until certain here, so no more trials can"
                " follow; choose another --out"
            )

    def extend(self) -> None:
        """Store a larger number of trials. Until all have ended, former final runs stay where they are."""
        for trials in self._contenders:
            trials.extend()

    def is_tidy(self) -> bool:
        """Whether no final run in this folder is superseded, as by another worker's trials."""
        return not any(trials.superseded(self._out) for trials in self._contenders if trials.result().complete)

    def results(self) -> list[SearchResult]:
        """Return the results of each contender so far."""
        return [trials.result() for trials in self._contenders]

    def final_values(self) -> dict[str, float | None]:
        """Return the metric of the claimed final runs of the best so far, by name; None for unfinished ones."""
        values = self._claimed_finals()
        runs = [result.finals(self._plan.seeds) for result in self.results()]
        return {run.name: values[claim] for each in runs for claim, run in each.items() if claim in values}

    def _claimed_finals(self) -> dict[str, float | None]:
        return {trial.user_attrs["choice"]: trial.value for trial in self._finals.held()}

    def elsewhere(self) -> list[Elsewhere]:
        """Return the unfinished runs of other workers."""
        trials = [
            (contender.trial_name(trial.number), True, trial)
            for contender, claims in ((each.contender, each.claims) for each in self._contenders)
            for trial in claims.held()
        ]
        runs = self._final_runs  # without those of former best settings, which nobody needs
        finals = [(trial.user_attrs["choice"], trial) for trial in self._finals.held()]
        everything = [*trials, *((runs[claim].name, False, trial) for claim, trial in finals if claim in runs)]
        return [
            Elsewhere(name, is_trial, trial.user_attrs["place"], trial.user_attrs.get("left"))
            for name, is_trial, trial in everything
            if not trial.state.is_finished() and trial.user_attrs["worker"] != self._worker.id
        ]

    def next(self) -> RunStatus | None:
        """Claim a run; None if there is none, then for `_ASK_AGAIN_S` without reading the storage."""
        if time.monotonic() - self._searched_s < _ASK_AGAIN_S:
            return None
        found = self._unfinished() or self._new_trial() or self._new_final()
        self._set_aside()
        if found is None:
            self._searched_s = time.monotonic()
            self.waiting = self._others_at_work()
            return None
        run, folder, claimed = found
        self._claimed[run.name] = claimed
        claimed.claims.leave(claimed.number, None)
        try:
            return run_status(run, folder)
        except AsgoError:  # the folder holds something else; the run's own process reports it
            return RunStatus(run, folder / run.name, 0, begun=False)

    def recorded(self, run: RunStatus, row: Row) -> bool:
        """Report the metric to the pruner, except before the first step and after the last."""
        claimed = self._claimed[run.run.name]
        if claimed.trials is None or not 0 < row["step"] < run.run.config.training.steps:
            return False
        value: float = row[self._plan.metric.name]  # type: ignore[literal-required]
        if not claimed.claims.report(claimed.number, row["step"], value):
            return False
        self._pruned.add(run.run.name)
        return True

    def ended(self, run: RunStatus, ending: Ending) -> Ending:
        """Store the result for all workers."""
        claimed, metric = self._claimed[run.run.name], self._plan.metric
        self._searched_s = -math.inf
        if ending.kind == "done":
            value = run_status(run.run, run.folder.parent).final_metrics()[metric.name]
            claimed.claims.finish(claimed.number, value)
            return Ending("done", f"done, {self._settings(run)}: {metric.name} {metric.text(value)}")
        if claimed.trials is not None and ending.kind == "stopped" and run.run.name in self._pruned:
            claimed.claims.prune(claimed.number)
            return Ending("stopped", f"pruned, {self._settings(run)}")
        divergence = RunFolder(run.folder).divergence()
        if claimed.trials is not None and ending.kind == "failed" and divergence is not None:
            claimed.claims.finish(claimed.number, metric.sign * math.inf)
            return Ending("done", f"diverged at step {divergence.step}, {self._settings(run)}")
        if ending.kind == "failed" and claimed.trials is not None:
            self._failed.add(claimed.trials.contender.name)
        claimed.claims.leave(claimed.number, ending.words)
        return ending

    def _unfinished(self) -> tuple[SweepRun, Path, _Claimed] | None:
        for trials in self._contenders:
            for trial in self._own(trials.claims):
                if trials.contender.trial_name(trial.number) not in self._claimed:
                    return trials.run(trial), self._out / TRIALS, _Claimed(trials.claims, trial.number, trials)
        finals = self._final_runs
        for trial in self._own(self._finals):
            run = finals.get(trial.user_attrs["choice"])
            if run is not None and run.name not in self._claimed:
                return run, self._out, _Claimed(self._finals, trial.number, None)
        return None

    def _new_trial(self) -> tuple[SweepRun, Path, _Claimed] | None:
        for trials in sorted(self._contenders, key=lambda trials: len(trials.claims.held())):
            if trials.contender.name not in self._failed:
                trial = trials.claim(self._worker)
                if trial is not None:
                    return trials.run(trial), self._out / TRIALS, _Claimed(trials.claims, trial.number, trials)
        return None

    def _new_final(self) -> tuple[SweepRun, Path, _Claimed] | None:
        held = self._claimed_finals()
        for claim, run in self._final_runs.items():
            if claim not in held:
                trial = self._finals.add(self._worker, claim, {}, {})
                if trial is not None:
                    return run, self._out, _Claimed(self._finals, trial.number, None)
        return None

    @property
    def _final_runs(self) -> dict[str, SweepRun]:
        """Final runs of contenders whose trials have all ended, by claim; the first seed of each before the second."""
        runs: dict[str, SweepRun] = {}
        results = [result for result in self.results() if result.complete]
        for seed, result in itertools.product(self._plan.seeds, results):
            runs |= result.finals([seed])
        return runs

    def _set_aside(self) -> None:
        """Move final runs whose settings are no longer the best out of the way, and out of comparisons."""
        for trials in self._contenders:
            if trials.contender.name not in self._tidy and trials.result().complete:
                self._tidy.add(trials.contender.name)
                for path, number in trials.superseded(self._out).items():
                    target = self._out / TRIALS / SUPERSEDED / f"{path.name}-t{number}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # another worker in this folder moved it
                        path.rename(target)

    def _own(self, claims: Claims) -> list[FrozenTrial]:
        """Return this worker's unfinished claims. The folder's lock guarantees that no other process runs them."""
        running = (trial for trial in claims.held() if not trial.state.is_finished())
        return [trial for trial in running if trial.user_attrs["worker"] == self._worker.id]

    def _others_at_work(self) -> str | None:
        elsewhere = [run for run in self.elsewhere() if run.is_trial and run.left is None]
        if not elsewhere:
            return None
        places = ", ".join(sorted({run.place for run in elsewhere}))
        return f"waiting for {len(elsewhere)} trials of other workers: {places}"

    @cached_property
    def _worker(self) -> Worker:
        """This folder's worker of this number; its id is stored under its lock."""

        path = queue_folder(self._out, self._number) / "worker"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, uuid.uuid4().hex.encode())
        number = f", worker {self._number}" if self._number else ""
        return Worker(path.read_text(), f"{socket.gethostname()}:{self._out.absolute()}{number}")

    def _settings(self, run: RunStatus) -> str:
        settings = flatten(run.run.config.model_dump(mode="json"))
        return ", ".join(f"{short_key(key)} {_short(settings[key])}" for key in self._plan.search.space)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
