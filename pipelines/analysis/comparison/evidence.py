"""Apply the evidence rule of a benchmark to contenders, and say which runs it does not accept, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.analysis.comparison.results import Entry, Evidence
from pipelines.analysis.comparison.rules import RULES, EvidenceRule
from pipelines.analysis.comparison.settings import identity, settings_of
from pipelines.config import Settings, flatten
from pipelines.errors import UsageError
from pipelines.settings_file import read_settings

_STEPS = "training.steps"


class RuleFile(Settings):
    """Content of a rule's file."""

    target: float
    threshold: float = Field(gt=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Values that a run must have; nested, or by dotted key."""


def rule_named(name: str) -> EvidenceRule:
    """Return a rule of `RULES`, or that of a TOML file. Raises `UsageError` with one line for each problem."""
    if name in RULES:
        return RULES[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"--rule {name}: unknown rule; known: {', '.join(RULES)}, and files with the suffix .toml")
    rule = read_settings(path, RuleFile)
    return EvidenceRule(path.stem, rule.target, rule.threshold, flatten(rule.settings))


def evidence_of(
    rule: EvidenceRule, entries: Sequence[Entry], contenders: Sequence[Entry], until_certain: Collection[str] = ()
) -> tuple[Evidence, ...]:
    """Return the evidence of each contender; `entries` also has the settings that are not contenders.

    `until_certain` are the labels of contenders whose results decided how many seeds they have.
    """
    return tuple(_evidence(rule, entry, entries, entry.label in until_certain) for entry in contenders)


def _evidence(rule: EvidenceRule, entry: Entry, entries: Sequence[Entry], until_certain: bool) -> Evidence:
    final = entry.final
    objections = [*_objections(rule, entry), *["results decided how many seeds it has"] * until_certain]
    return Evidence(
        entry=entry,
        margin=None if final is None else rule.margin(final.mean, final.count),
        is_met=final is not None and rule.is_met(final.mean, final.count),
        runs_needed=None if final is None else rule.runs_needed(final.mean),
        objections=tuple(objections),
        doubts=tuple(_doubts(rule, entry, entries)),
    )


def evidence_cautions(rule: EvidenceRule, found: Sequence[Evidence], unreadable: Sequence[str]) -> list[str]:
    """Return a sentence for each reason why runs do not qualify, or may not."""
    lost = [f"{rule.name}: runs that cannot be read are left out, and the rule takes all."] if unreadable else []
    return [
        *(f"{rule.name}: {each.entry.label} does not qualify: {text}." for each in found for text in each.objections),
        *(f"{rule.name}: {each.entry.label}: {text}." for each in found for text in each.doubts),
        *lost,
    ]


def _objections(rule: EvidenceRule, entry: Entry) -> Iterator[str]:
    config = entry.runs[0].config
    given = {} if config is None else flatten(config.model_dump(mode="json"))
    for key, needed in rule.settings.items() if config else ():
        if given.get(key) != needed:
            value = "not set" if given.get(key) is None else given[key]
            yield f"{key} is {value}, and the rule needs {needed}"
    without = [f"{run.name} ({run.state})" for run in entry.runs if run.final is None]
    if without:
        yield f"runs without a final loss, and the rule takes all: {', '.join(without)}"
    counts = Counter(run.seed for run in entry.runs if run.seed is not None)
    repeated = [str(seed) for seed, count in counts.items() if count > 1]
    if repeated:
        yield f"several runs of seed {', '.join(repeated)} are not independent"
    if any(run.lineage for run in entry.runs):
        yield "branches are not independent runs"


def _doubts(rule: EvidenceRule, entry: Entry, entries: Sequence[Entry]) -> Iterator[str]:
    if entry.runs[0].config is None:
        yield f"the log does not say {', '.join(rule.settings)}, and the rule needs the benchmark's"
    if entry.final is not None and entry.final.count == 1:
        yield "a single run; more runs, with seeds fixed in advance, are better evidence"
    others = [other for other in entries if other is not entry and _but_for_steps(other) == _but_for_steps(entry)]
    if others:
        steps = ", ".join("unknown" if (length := other.runs[0].steps) is None else f"{length:,}" for other in others)
        yield f"the same settings have runs of {steps} steps too, and the stopping step must be fixed in advance"


def _but_for_steps(entry: Entry) -> str:
    return identity({key: value for key, value in settings_of(entry.runs[0]).items() if key != _STEPS})
