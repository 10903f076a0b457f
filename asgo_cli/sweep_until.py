"""`asgo sweep --until-certain`: its runs, a line after each look, and its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asgo_cli import console
from asgo_cli.slurm import SlurmJobs, submit_runs
from asgo_cli.sweep_runs import raise_failures, show_plan, train_runs
from pipelines.shell import command
from pipelines.tasks import TASKS

if TYPE_CHECKING:
    from pipelines.resolve import Layer
    from pipelines.sweeps.contenders import SearchPlan
    from pipelines.sweeps.definition import Sweep
    from pipelines.sweeps.queue import Failure
    from pipelines.sweeps.search import SearchResult
    from pipelines.sweeps.until_certain import Plan, Seeds, SeedWish, Standing


def sweep_until_certain(
    definition: Sweep,
    set_layer: Layer,
    wish: SeedWish,
    folder: Path,
    slots: int | None,
    gpus: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the runs of a list, or the final runs of a search, until all pairs are decided; or show the plan."""
    if dry_run:
        _show_plan(definition, set_layer, wish, folder, as_json)
        return
    plan, standing, failures = train_until_certain(definition, set_layer, wish, folder, slots, gpus)
    _show_verdicts(plan, standing, failures, as_json)
    console.suggest_next(command("asgo", "compare", folder))
    raise_failures(failures)


def submit_until_certain(
    jobs: SlurmJobs,
    definition: Sweep,
    set_layer: Layer,
    wish: SeedWish,
    folder: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Submit the runs before the next look, or show the verdicts; a search must have ended. Each call looks again."""
    from asgo_cli.sweep_search import best_of_ended_search
    from pipelines.sweeps.status import run_statuses
    from pipelines.sweeps.until_certain import UntilCertain

    if definition.search is None:
        plan = _plan_of_list(definition, set_layer, wish)
    else:
        search, _ = _checked_search(definition, set_layer, wish)
        plan = _plan_of_search(search, best_of_ended_search(search, folder), wish.seeds(definition), wish.against)
    source = UntilCertain(plan, folder, lambda _: None)
    standing = source.look()
    if not dry_run:
        source.record(standing)
    if standing.missing:
        _say_look(plan, standing)
        submit_runs(jobs, run_statuses(standing.missing, folder), folder, dry_run, as_json)
        return
    _show_verdicts(plan, standing, (), as_json)
    console.suggest_next(command("asgo", "compare", folder))


def _show_plan(definition: Sweep, set_layer: Layer, wish: SeedWish, folder: Path, as_json: bool) -> None:
    from pipelines.sweeps.status import run_statuses
    from pipelines.sweeps.until_certain import require_same_record

    if definition.search is None:
        plan = _plan_of_list(definition, set_layer, wish)
        require_same_record(plan.record, folder)
        every = [run for runs in plan.runs.values() for run in runs]
        show_plan(run_statuses(plan.first_runs, folder), as_json, run_statuses(every, folder))
    else:
        from asgo_cli.sweep_search import show_search_plan

        search, plan = _checked_search(definition, set_layer, wish)
        require_same_record(plan.record, folder, before_search=True)
        show_search_plan(search, folder, as_json, len(plan.record.seeds))


def train_until_certain(
    definition: Sweep, set_layer: Layer, wish: SeedWish, folder: Path, slots: int | None, gpus: int | None
) -> tuple[Plan, Standing, list[Failure]]:
    """Train what is missing, the trials of a search first; return what is known then, and the runs that failed."""
    from pipelines.sweeps.until_certain import require_same_record

    if definition.search is None:
        plan = _plan_of_list(definition, set_layer, wish)
    else:
        from asgo_cli.sweep_search import best_of_search

        search, planned = _checked_search(definition, set_layer, wish)
        require_same_record(planned.record, folder, before_search=True)
        results = best_of_search(search, folder, slots, gpus)
        plan = _plan_of_search(search, results, wish.seeds(definition), wish.against)
    return plan, *_train(plan, folder, slots, gpus)


def _plan_of_list(definition: Sweep, set_layer: Layer, wish: SeedWish) -> Plan:
    from pipelines.sweeps.definition import resolve_runs
    from pipelines.sweeps.until_certain import plan_runs

    seeds = wish.seeds(definition)
    runs = resolve_runs(definition, set_layer, seeds.all)
    return plan_runs(runs, seeds, TASKS[definition.task].metrics[0], wish.against)


def _plan_of_search(search: SearchPlan, results: Sequence[SearchResult], seeds: Seeds, against: str | None) -> Plan:
    from pipelines.sweeps.until_certain import plan_runs

    best = [(each.contender, each.settings) for each in results if each.settings is not None]
    runs = [contender.final(settings, seed) for seed in seeds.all for contender, settings in best]
    return plan_runs(runs, seeds, search.metric, against)


def _checked_search(definition: Sweep, set_layer: Layer, wish: SeedWish) -> tuple[SearchPlan, Plan]:
    """Return the plan of the search, and that of final runs without the best settings.

    Errors of the final runs are thus raised before the search.
    """
    from pipelines.sweeps.contenders import plan_search
    from pipelines.sweeps.until_certain import plan_runs

    seeds = wish.seeds(definition)
    search = plan_search(definition, set_layer, seeds.first)
    runs = [contender.final({}, seed) for seed in seeds.all for contender in search.contenders]
    return search, plan_runs(runs, seeds, search.metric, wish.against)


def _train(plan: Plan, folder: Path, slots: int | None, gpus: int | None) -> tuple[Standing, list[Failure]]:
    from pipelines.sweeps.until_certain import UntilCertain

    source = UntilCertain(plan, folder, lambda standing: _say_look(plan, standing))
    standing = source.look()
    failures: list[Failure] = []
    if standing.missing:
        most = sum(map(len, plan.runs.values())) - source.trained
        failures = train_runs(source, plan.first_runs, f"at most {most}", folder, slots, gpus)
        standing = source.look()
    else:
        source.record(standing)
    return standing, failures


def _say_look(plan: Plan, standing: Standing) -> None:
    if standing.looks and standing.missing:
        look = standing.looks[-1]
        growing = ", ".join(dict.fromkeys(run.variant for run in standing.missing))
        decided = sum(each.outcome != "cannot tell" for each in standing.verdicts)
        undecided = f"{plan.record.pairs - decided} of {plan.record.pairs} pairs undecided"
        console.say(f"look after {look.seeds} seeds: {undecided}; seed {plan.record.seeds[look.seeds]} of {growing}")


def _show_verdicts(plan: Plan, standing: Standing, failures: Sequence[Failure], as_json: bool) -> None:
    metric, seeds = plan.metric, {name: len(own) for name, own in standing.results.items()}
    diverged = [name for name, own in standing.results.items() if None in own.values()]
    most = len(plan.record.seeds) * len(seeds)
    if as_json:
        verdicts = [
            {
                "first": each.first,
                "second": each.second,
                "outcome": each.outcome,
                "difference": None if each.difference is None else each.difference.mean,
                "p": each.p,
            }
            for each in standing.verdicts
        ]
        reasons = [{"run": run.name, "reason": run.reason, "log": str(run.log)} for run in failures]
        console.show_json(
            {
                "verdicts": verdicts,
                "looks": [look.model_dump() for look in standing.looks],
                "seeds": seeds,
                "diverged": diverged,
                "runs": sum(seeds.values()),
                "runs_with_all_seeds": most,
                "failures": reasons,
            }
        )
        return
    cells = [
        (
            each.first,
            each.second,
            each.outcome,
            "" if each.difference is None else metric.difference(each.difference.mean, "+") + metric.difference_unit,
            "" if each.p is None else f"{each.p:.2g}",
        )
        for each in standing.verdicts
    ]
    if cells:
        console.show_table(("first", "second", "the first is", "first minus second", "p, corrected"), cells)
    decided = sum(each.outcome != "cannot tell" for each in standing.verdicts)
    counts = ", ".join(f"{name} {count}" for name, count in seeds.items())
    console.show_facts(
        [
            (
                f"{decided} of {plan.record.pairs} pairs decided",
                f"at {plan.record.confidence:.0%}, by the sequential test",
            ),
            ("seeds", counts),
            (f"{sum(seeds.values())} runs", f"{len(plan.record.seeds)} seeds of all are {most} runs"),
        ]
    )
    for name in diverged:
        console.warn(f"{name}: a run diverged, so it got no further seeds")
