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
from pipelines.analysis.comparison.log_cautions import log_cautions
from pipelines.analysis.comparison.logs.column_names import parse_columns
from pipelines.analysis.comparison.read_logs import without_cut_short
from pipelines.analysis.comparison.read_runs import read_runs
from pipelines.analysis.comparison.results import Comparison, Entry, Run, Target
from pipelines.analysis.comparison.rules import EvidenceRule
from pipelines.analysis.comparison.tuning import tunings_of
from pipelines.analysis.comparison.until_certain import Member, members_of, mixing_cautions, recorded_reference
from pipelines.analysis.comparison.verdicts import contender_named, rule, verdicts
from pipelines.errors import UsageError
from pipelines.tasks import TASKS
from pipelines.tasks.metric import LOSS, Metric


def compare_runs(
    paths: Sequence[Path],
    target: float | None = None,
    confidence: float = 0.95,
    evidence_rule: str | None = None,
    metric_name: str | None = None,
    against: str | None = None,
    columns: str | None = None,
) -> Comparison:
    """Compare runs and logs of other programs, or all in folders. A run in progress counts up to its last record.

    `target` is a validation loss to reach, in nats, or an accuracy, as a fraction; `confidence` is that of intervals
    and verdicts, between 0 and 1; `evidence_rule` is a name in `rules.RULES` or a TOML file; `metric_name` is a name in
    `tasks.metric.METRICS`, by default the first metric of the runs' task, or the loss if there is a rule; `against` is
    a contender's label or optimizer, with which all others are tested, instead of all pairs; by default that of the
    sweep that added seeds until certain; `columns` names columns of logs, see `logs.column_names.parse_columns`.

    Raises:
        UsageError: a path contains no run, the runs have different tasks or metrics, a number is out of range, the rule
            is unknown, their task does not record the metric, or there is no such contender or column.
        AsgoError: no run can be read.
    """
    _check_confidence(confidence)
    asked, metric_name = _rule_and_metric(evidence_rule, metric_name)
    runs, left_out = read_runs(find_runs(paths), metric_name, parse_columns(columns))
    runs = without_cut_short(drawn_from_their_parents(runs))
    task, metric = _common_task(runs), _common_metric(runs)
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
    judged = verdicts(contenders, confidence, metric, reference, members)
    cautions = left_out + ([] if asked is None else evidence_cautions(asked, evidence, left_out))
    cautions += mixing_cautions([each.label for each in contenders if each.final is not None], members)
    cautions += log_cautions(entries, judged, metric) + cautions_of(runs, entries, contenders, sensitivities, metric)
    return Comparison(
        task=task,
        unit="tokens" if task is None else TASKS[task].unit,
        metric=metric,
        entries=tuple(entries),
        contenders=tuple(contenders),
        verdicts=judged,
        rule=rule(confidence, metric, reference, members),
        confidence=confidence,
        against=reference,
        target=aim,
        sensitivities=tuple(sensitivities),
        setting_effects=tuple(setting_effects_of(contenders, labels)),
        tunings=tunings_of(runs, entries, confidence, metric),
        cautions=tuple(cautions),
        evidence_rule=asked,
        evidence=evidence,
    )


def _target(
    contenders: Sequence[Entry], target: float | None, rule: EvidenceRule | None, metric: Metric
) -> Target | None:
    """Return the given target, or else that of the rule, or else the default."""
    if rule is not None and target is None:
        return Target(rule.target, f"the target of {rule.name}")
    return target_of(contenders, target, metric)


def _reference(contenders: Sequence[Entry], asked: str | None, members: Mapping[str, Member]) -> Entry | None:
    """Return the contender that is asked for, or else the one that a sweep until certain has recorded."""
    if asked is None:
        return recorded_reference(contenders, members)
    named = contender_named(contenders, asked, "--against")
    if named.final is None:
        raise UsageError(f"--against {asked}: none of its runs has finished")
    return named


def _rule_and_metric(name: str | None, metric: str | None) -> tuple[EvidenceRule | None, str | None]:
    """Return the rule with this name, and the metric: with a rule, the loss. Raise `UsageError` if they do not fit."""
    if name is None:
        return None, metric
    asked = rule_named(name)
    if metric not in (None, LOSS.name):
        raise UsageError(f"--rule is about {LOSS.plural}: leave out --metric {metric}")
    return asked, LOSS.name


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"the confidence must be between 0 and 1, not {confidence}; 0.95 is usual")


def _check_target(target: float | None, metric: Metric) -> None:
    if target is not None and not math.isfinite(target):
        raise UsageError(f"the target must be a finite {metric.name}, not {target}")
    if target is not None and metric.is_share and not 0 <= target <= 1:
        raise UsageError(f"the target must be a fraction between 0 and 1, not {target:g}; 0.9 is 90 %")


def _common_task(runs: Sequence[Run]) -> str | None:
    """Return the task of all runs; None if all are read from logs. Raise `UsageError` if they differ."""
    tasks = [(run, run.config.task) for run in runs if run.config is not None]
    for run, task in tasks:
        first, its_task = tasks[0]
        if task != its_task:
            raise UsageError(
                f"{first.path} trains {its_task}, {run.path} {task}: their losses do not compare; give runs of one task"
            )
    return tasks[0][1] if tasks else None


def _common_metric(runs: Sequence[Run]) -> Metric:
    """Return the metric of all runs. Raise `UsageError` if they differ: each log has its own."""
    first = runs[0]
    for run in runs:
        if run.metric is not first.metric:
            raise UsageError(
                f"{first.path} validates by {first.metric.name}, {run.path} by {run.metric.name}, which do "
                "not compare; give logs of one metric"
            )
    return first.metric
