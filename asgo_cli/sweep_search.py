"""`asgo sweep` of a file with a `[search]` table: its plan, its trials and final runs, and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asgo_cli import console
from asgo_cli.export import export_command
from asgo_cli.slurm import SlurmJobs, submit_workers
from asgo_cli.sweep_runs import raise_failures, rounded, train_runs
from pipelines.config import flatten
from pipelines.errors import AsgoError, UsageError
from pipelines.optimizers import short_key
from pipelines.shell import command
from pipelines.tasks import task_of

if TYPE_CHECKING:
    from pipelines.sweeps.contenders import Contender, SearchPlan
    from pipelines.sweeps.definition import SweepRun
    from pipelines.sweeps.queue import Failure
    from pipelines.sweeps.search import SearchResult, SearchRuns
    from pipelines.tasks.metric import Metric


def search(
    plan: SearchPlan,
    folder: Path,
    slots: int | None,
    gpus: int | None,
    dry_run: bool,
    as_json: bool,
    worker: int | None = None,
    jobs: SlurmJobs | None = None,
) -> None:
    """Run the trials and final runs that remain, or show the plan."""
    _require_recorded_seeds(plan, folder)
    if jobs is not None and _submit(jobs, plan, folder, dry_run, as_json):
        return
    if dry_run:
        show_search_plan(plan, folder, as_json)
        return
    runs, failures = _train(plan, folder, slots, gpus, worker)
    _end(plan, folder, runs, failures, as_json)


def train_search(plan: SearchPlan, folder: Path, slots: int | None, gpus: int | None) -> None:
    """Run the trials and final runs that remain; raise `AsgoError` if some have not ended."""
    _require_recorded_seeds(plan, folder)
    runs, failures = _train(plan, folder, slots, gpus)
    raise_failures(failures)
    _raise_left_elsewhere(runs)


def _require_recorded_seeds(plan: SearchPlan, folder: Path) -> None:
    from pipelines.sweeps.until_certain import require_recorded_seeds

    require_recorded_seeds(((each.name, seed) for each in plan.contenders for seed in plan.seeds), folder)


def best_of_search(plan: SearchPlan, folder: Path, slots: int | None, gpus: int | None) -> list[SearchResult]:
    """Run the trials that remain, without final runs; return the results, or show them and raise if some have none."""
    trials = replace(plan, seeds=())
    runs, failures = _train(trials, folder, slots, gpus)
    if failures or _left(trials, runs):
        _end(trials, folder, runs, failures, as_json=False)
        raise AsgoError("the search has not ended on all workers; when it has, give the same command again")
    results = runs.results()
    _warn_about(results, plan.metric)
    return results


def best_of_ended_search(plan: SearchPlan, folder: Path) -> list[SearchResult]:
    """Return the results of the trials. Raises `UsageError` if some have not ended."""
    from pipelines.sweeps.search import is_begun, open_search

    trials = replace(plan, seeds=())
    runs = open_search(trials, folder) if is_begun(folder) else None
    if runs is None or _left(trials, runs):
        raise UsageError("--until-certain with --slurm: the search has not ended; submit it without --until-certain")
    return runs.results()


def _submit(jobs: SlurmJobs, plan: SearchPlan, folder: Path, dry_run: bool, as_json: bool) -> bool:
    """Submit workers if anything is left for them; return whether there is."""
    from pipelines.sweeps.search import is_begun, open_search, record_search

    if dry_run and not is_begun(folder):
        left = len(plan.contenders) * plan.search.trials + len(_finals(plan))
    else:
        runs = open_search(plan, folder)
        left = _left(plan, runs)
        if left and not dry_run:
            runs.extend()
            record_search(plan, folder)
    if left:
        submit_workers(jobs, left, folder, dry_run, as_json)
    return left > 0


def _train(
    plan: SearchPlan, folder: Path, slots: int | None, gpus: int | None, worker: int | None = None
) -> tuple[SearchRuns, list[Failure]]:
    from pipelines.sweeps.search import open_search, record_search

    runs = open_search(plan, folder, worker)
    left = _left(plan, runs)
    if not left and runs.is_tidy():
        return runs, []
    runs.extend()
    if not worker:  # two workers would write the same file at the same time
        record_search(plan, folder)
    whole = [contender.whole for contender in plan.contenders]
    return runs, train_runs(runs, whole, left, folder, slots, gpus, worker)


def _end(plan: SearchPlan, folder: Path, runs: SearchRuns, failures: Sequence[Failure], as_json: bool) -> None:
    _show_results(plan, runs, failures, as_json)
    if any(result.complete and result.on_edge for result in runs.results()):
        _suggest_more_trials(plan, folder)
    console.suggest_next(export_command(folder))
    raise_failures(failures)
    _raise_left_elsewhere(runs)


def _left(plan: SearchPlan, runs: SearchRuns) -> int:
    """Return the number of trials and final runs that have not ended, here and on other workers."""
    results = runs.results()
    ended = _ended_finals(plan, runs)
    without_best = [result.contender.name for result in results if result.complete and result.settings is None]
    finals = [name for name, contender in _finals(plan) if contender.name not in without_best]
    return sum(plan.search.trials - result.trials for result in results) + len({*finals} - ended)


def _ended_finals(plan: SearchPlan, runs: SearchRuns) -> set[str]:
    """Return the final runs that have ended, without those that a new best may supersede."""
    complete = [result.contender.name for result in runs.results() if result.complete]
    values = runs.final_values()
    return {name for name, each in _finals(plan) if each.name in complete and values.get(name) is not None}


def _finals(plan: SearchPlan) -> list[tuple[str, Contender]]:
    return [(contender.final_name(seed), contender) for contender in plan.contenders for seed in plan.seeds]


def show_search_plan(plan: SearchPlan, folder: Path, as_json: bool, most_seeds: int | None = None) -> None:
    """Show trials, final runs and their cost, and that of up to `most_seeds` final runs of each contender."""
    from pipelines.sweeps.search import is_begun, open_search

    runs = open_search(plan, folder) if is_begun(folder) else None
    done = {} if runs is None else {result.contender.name: result.trials for result in runs.results()}
    ended = set() if runs is None else _ended_finals(plan, runs)
    trial = {contender.name: _tokens(contender.own_trial) for contender in plan.contenders}
    final = {contender.name: _tokens(contender.whole) for contender in plan.contenders}
    total = {name: plan.search.trials * trial[name] + len(plan.seeds) * final[name] for name in final}
    left = sum(total.values()) - sum(done.get(name, 0) * count for name, count in trial.items())
    left -= sum(final[contender.name] for name, contender in _finals(plan) if name in ended)
    unit = task_of(plan.contenders[0].config).unit
    more = 0 if most_seeds is None else (most_seeds - len(plan.seeds)) * sum(final.values())
    if as_json:
        rows = [
            {
                "contender": contender.name,
                "optimizer": contender.config.optimizer.name,
                "own": contender.own,
                "first_points": contender.first_points() if plan.search.sampler == "grid" else None,
                "trials": plan.search.trials,
                "trials_done": done.get(contender.name, 0),
                "trial_steps": contender.own_trial.config.training.steps,
                unit: total[contender.name],
            }
            for contender in plan.contenders
        ]
        everything = sum(total.values())
        most = {} if most_seeds is None else {f"{unit}_at_most": everything + more}
        console.show_json({"contenders": rows, "seeds": plan.seeds, unit: everything, f"{unit}_left": left, **most})
        return
    cells = [
        (name, _points(contender), f"{done.get(name, 0)} of {plan.search.trials}", *map(rounded, sizes))
        for contender in plan.contenders
        for name in [contender.name]
        for sizes in [[trial[name], final[name]] if trial != final else [final[name]]]
    ]
    sizes = (f"{unit} a trial", "a final run") if trial != final else (f"{unit} a run",)
    console.show_table(("contender", "searched", "trials done", *sizes), cells)
    counts = f"{len(cells) * plan.search.trials} trials and {len(_finals(plan))} final runs"
    may_stay = runs is not None and len(ended) < sum(value is not None for value in runs.final_values().values())
    at_most = "at most " if plan.search.pruner != "none" or may_stay else ""
    facts = [(counts, f"{at_most}{sum(total.values()):,} {unit}, {left:,} of them left")]
    if most_seeds is not None:
        facts.append((f"until certain, at most {most_seeds} seeds", f"at most {more:,} {unit} more"))
    console.show_facts(facts)
    for line in _shortened(plan.contenders):
        console.say(f"shorter trials: {line}")
    console.say("dry run: nothing was written")


def _points(contender: Contender) -> str:
    """Describe the searched settings in a few words."""
    if contender.search.sampler != "grid":
        return ", ".join(short_key(key) for key in contender.search.space)
    rows = [(key, [point[key] for point in contender.first_points()]) for key in contender.search.space]
    words = [f"{short_key(key)} {min(values):.3g} to {max(values):.3g}" for key, values in rows]
    return f"{', '.join(words)}, {math.prod(contender.points)} points"


def _tokens(run: SweepRun) -> int:
    return run.samples * run.tokens_per_sample


def _shortened(contenders: Sequence[Contender]) -> list[str]:
    """Describe in which settings the trials differ from the final runs, besides what is searched."""
    found: dict[str, list[str]] = {}
    for contender in contenders:
        whole, trial = (flatten(run.config.model_dump(mode="json")) for run in (contender.whole, contender.own_trial))
        changed = [f"{key} {whole[key]} → {trial[key]}" for key in whole if whole[key] != trial[key]]
        found.setdefault(", ".join(changed), []).append(contender.name)
    return [f"{words} ({', '.join(names)})" if len(found) > 1 else words for words, names in found.items() if words]


def _show_results(plan: SearchPlan, runs: SearchRuns, failures: Sequence[Failure], as_json: bool) -> None:
    metric, ended, results = plan.metric, runs.final_values(), runs.results()
    finals = {
        result.contender.name: {seed: ended.get(result.contender.final_name(seed)) for seed in plan.seeds}
        for result in results
    }
    if as_json:
        rows = [_facts(result, finals[result.contender.name], metric) for result in results]
        reasons = [{"run": run.name, "reason": run.reason, "log": str(run.log)} for run in failures]
        console.show_json({"contenders": rows, "failures": reasons})
    else:
        cells = [
            (
                result.contender.name,
                f"{result.trials} of {plan.search.trials}",
                _words(result.settings),
                metric.text(result.value),
                " ".join(metric.text(value) or "-" for value in finals[result.contender.name].values()),
            )
            for result in results
        ]
        console.show_table(("contender", "trials", "best", f"its {metric.name}", f"final {metric.plural}"), cells)
    _warn_about(results, metric)


def _warn_about(results: Sequence[SearchResult], metric: Metric) -> None:
    for result in results:
        if result.complete and result.settings is None:
            console.warn(
                f"{result.contender.name}: no trial ended with a finite {metric.name}, so there are no final runs"
            )
        if result.complete and result.on_edge:
            console.warn(
                f"{result.contender.name}: its best, {_words(result.settings)}, lies on the edge of the tried"
                f" values of {' and '.join(map(short_key, result.on_edge))}"
            )


def _suggest_more_trials(plan: SearchPlan, folder: Path) -> None:
    """Say how to continue the search. Of a shipped sweep the user edits a copy, whose name makes it the same search."""
    from pipelines.sweeps.definition import shipped_file

    is_own = plan.origin.endswith(".toml")
    file = plan.origin if is_own else f"{plan.name}.toml"
    place = file if is_own else f"{file}, a copy of {shipped_file(plan.name)}"
    more = plan.search.trials + (plan.search.trials + 1) // 2
    again = command("asgo", "sweep", file, "--out", folder)
    console.warn(f"to give all contenders more trials, write trials = {more} in {place}, and continue: {again}")


def _facts(result: SearchResult, finals: Mapping[int, float | None], metric: Metric) -> dict[str, Any]:
    return {
        "contender": result.contender.name,
        "trials": result.trials,
        "pruned": result.pruned,
        "diverged": result.diverged,
        "best": result.settings,
        f"best_{metric.name}": result.value,
        "on_edge": bool(result.on_edge),
        f"final_{metric.plural}": [{"seed": seed, metric.name: value} for seed, value in finals.items()],
    }


def _raise_left_elsewhere(runs: SearchRuns) -> None:
    """Report runs that other workers are training; raise `AsgoError` for runs that they left unfinished."""
    for run in runs.elsewhere():
        if run.left is None:
            console.say(f"{run.name}: running at {run.place}")
    left = [run for run in runs.elsewhere() if run.left is not None]
    if left:
        lines = (f"run {run.name}: {run.left} at {run.place}; give the same command there to resume it" for run in left)
        raise AsgoError("\n".join(lines))


def _words(settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return ""
    return ", ".join(
        f"{short_key(key)} {value:.4g}" if isinstance(value, float) else f"{short_key(key)} {value}"
        for key, value in settings.items()
    )
