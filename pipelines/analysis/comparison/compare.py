"""Compare training runs, from their folders only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.analysis.comparison.branches import drawn_from_their_parents
from pipelines.analysis.comparison.cautions import cautions_of
from pipelines.analysis.comparison.entries import (
    Labels,
    contenders_of,
    entries_of,
    families_of,
    sensitivities_of,
    setting_effects_of,
    target_of,
    with_reach,
)
from pipelines.analysis.comparison.evidence import evidence_cautions, evidence_of, rule_named
from pipelines.analysis.comparison.find_runs import find_runs
from pipelines.analysis.comparison.read_runs import read_runs
from pipelines.analysis.comparison.results import Comparison, Entry, Run, Target
from pipelines.analysis.comparison.rules import EvidenceRule
from pipelines.analysis.comparison.until_certain import Member, members_of, mixing_cautions, recorded_reference
from pipelines.analysis.comparison.verdicts import contender_named, rule, verdicts
from pipelines.errors import UsageError
from pipelines.tasks import TASKS
from pipelines.tasks.metric import LOSS, Metric, choose_metric


def compare_runs(
    paths: Sequence[Path],
    target: float | None = None,
    confidence: float = 0.95,
    evidence_rule: str | None = None,
    metric_name: str | None = None,
    against: str | None = None,
) -> Comparison:
    """Compare runs, or all runs in folders of runs. A run in progress counts up to its last record.

    `target` is a validation loss to reach, in nats, or an accuracy, as a fraction; `confidence` is that of intervals
    and verdicts, between 0 and 1; `evidence_rule` is a name in `rules.RULES`; `metric_name` is a name in
    `tasks.metric.METRICS`, by default the first metric of the runs' task, or the loss if there is a rule; `against` is
    a contender's label or optimizer, with which all others are tested, instead of all pairs; by default that of the
    sweep that added seeds until certain.

    Raises:
        UsageError: a path contains no run, the runs have different tasks, a number is out of range, the rule is
            unknown, their task does not record the metric, or there is no such contender.
        AsgoError: no run can be read.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"the confidence must be between 0 and 1, not {confidence}; 0.95 is usual")
    asked = None if evidence_rule is None else rule_named(evidence_rule)
    if asked is not None:
        metric_name = _metric_of_rules(metric_name)
    runs, left_out = read_runs(find_runs(paths), metric_name)
    runs = drawn_from_their_parents(runs)
    task = _common_task(runs)
    metric = choose_metric(TASKS[task], metric_name, "--metric")
    _check_target(target, metric)
    families = families_of(runs)
    labels = Labels(families)
    entries = entries_of(families, labels, confidence, metric)
    aim = _target(contenders_of(entries), target, asked, metric)
    entries = [with_reach(entry, aim, metric) for entry in entries]
    contenders = contenders_of(entries)
    members = members_of(contenders)
    reference = _reference(contenders, against, members)
    sensitivities = sensitivities_of(families, labels)
    evidence = () if asked is None else evidence_of(asked, entries, contenders, members)
    objections = [] if asked is None else evidence_cautions(asked, evidence, left_out)
    cautions = [*left_out, *objections, *mixing_cautions(contenders, members)]
    return Comparison(
        task=task,
        unit=TASKS[task].unit,
        metric=metric,
        entries=tuple(entries),
        contenders=tuple(contenders),
        verdicts=verdicts(contenders, confidence, metric, reference, members),
        rule=rule(confidence, metric, reference, members),
        confidence=confidence,
        against=reference,
        target=aim,
        sensitivities=tuple(sensitivities),
        setting_effects=tuple(setting_effects_of(contenders, labels)),
        cautions=(*cautions, *cautions_of(runs, entries, contenders, sensitivities, metric)),
        evidence_rule=asked,
        evidence=evidence,
    )


def _target(
    contenders: Sequence[Entry], asked: float | None, evidence_rule: EvidenceRule | None, metric: Metric
) -> Target | None:
    if evidence_rule is not None and asked is None:
        return Target(evidence_rule.target, f"the target of {evidence_rule.name}")
    return target_of(contenders, asked, metric)


def _reference(contenders: Sequence[Entry], asked: str | None, members: Mapping[str, Member]) -> Entry | None:
    if asked is None:
        return recorded_reference(contenders, members)
    return contender_named(contenders, asked, "--against")


def _metric_of_rules(asked: str | None) -> str:
    """Return the metric of all evidence rules. Raise `UsageError` if another is asked for."""
    if asked not in (None, LOSS.name):
        raise UsageError(f"--rule is about {LOSS.plural}: leave out --metric {asked}")
    return LOSS.name


def _check_target(target: float | None, metric: Metric) -> None:
    if target is not None and not math.isfinite(target):
        raise UsageError(f"the target must be a finite {metric.name}, not {target}")
    if target is not None and metric.is_share and not 0 <= target <= 1:
        raise UsageError(f"the target must be a fraction between 0 and 1, not {target:g}; 0.9 is 90 %")


def _common_task(runs: Sequence[Run]) -> str:
    """Return the task of all runs. Raise `UsageError` if they differ."""
    first = runs[0]
    for run in runs:
        if run.config.task != first.config.task:
            raise UsageError(
                f"{first.path} trains {first.config.task}, {run.path} {run.config.task}: "
                "their losses do not compare; give runs of one task"
            )
    return first.config.task
