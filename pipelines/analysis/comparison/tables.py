"""Tables of a comparison: rounded texts for people, exact records for programs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.analysis.comparison.entries import known, whole
from pipelines.analysis.comparison.results import Comparison, Entry, Interval, Run, Tuning, Verdict
from pipelines.analysis.comparison.settings import differing_keys, settings_of
from pipelines.analysis.comparison.t_tests import MOST_SEEDS
from pipelines.storage import csv_cell, printable
from pipelines.tasks.metric import LOSS, Metric

Record = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Table:
    """A table: `texts` are the cells below `heads`; `records` have the same values and more as numbers or None.

    A table that is too long to read has only records.
    """

    name: str
    heads: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    records: tuple[Record, ...]

    def markdown(self) -> str:
        """Return the texts as a Markdown table: first column left-aligned, others right-aligned."""
        rule = ("---", *("---:" for _ in self.heads[1:]))
        lines = [self.heads, rule, *([_escaped(text) for text in row] for row in self.texts)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self) -> str:
        """Return the records as CSV with a header; floats read back exactly."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.records[0] if self.records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: csv_cell(value) for key, value in record.items()} for record in self.records)
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write the texts, if there are any, as Markdown and the records as CSV."""
        if self.texts:
            (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.csv").write_text(self.csv(), encoding="utf-8")


def _table(
    name: str, heads: Iterable[str], texts: Iterable[tuple[str, ...]], records: Iterable[dict[str, Any]]
) -> Table:
    """Return a table in which None replaces NaN and infinities, which JSON cannot represent."""
    finite = (
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        for record in records
    )
    return Table(name, tuple(heads), tuple(texts), tuple(finite))


def make_tables(comparison: Comparison) -> tuple[Table, ...]:
    """Return the tables, in the order of `TABLES`, that have rows."""
    made = (
        entry_table(comparison, comparison.entries),
        evidence_table(comparison),
        verdict_table(comparison, comparison.verdicts),
        run_table(comparison),
        _sensitivity_table(comparison),
        _setting_table(comparison),
        tuning_table(comparison),
        tuning_cost_table(comparison),
        _trial_table(comparison),
        _curve_table(comparison),
    )
    return tuple(table for table in made if table.records)


TABLES = (
    "entries",
    "evidence",
    "verdicts",
    "runs",
    "sensitivity",
    "settings",
    "tuning",
    "tuning_costs",
    "trials",
    "curves",
)
"""The names of the tables of `make_tables`."""


def entry_table(comparison: Comparison, entries: Sequence[Entry]) -> Table:
    """Return a table with a row per entry, without columns that are empty in all rows."""
    metric = comparison.metric
    columns: list[tuple[str, Callable[[Entry], str]]] = [
        ("", lambda entry: entry.label),
        ("seeds", _seeds),
        ("diverged", lambda entry: str(entry.diverged or "")),
        (f"final {metric.name}", lambda entry: with_margin(entry.final, metric)),
        (f"best {metric.name}", lambda entry: metric.text(_best(entry, metric))),
        (f"training {metric.name}", lambda entry: with_margin(entry.final_train, metric)),
        (metric.other.head, lambda entry: metric.other.text_beside(_beside(entry))),
        ("steps to target", lambda entry: _to_target(entry, "steps")),
        (f"{comparison.unit} to target", lambda entry: _to_target(entry, "tokens")),
        ("seconds to target", lambda entry: _to_target(entry, "seconds")),
        ("step, ms", lambda entry: digits(entry.step_ms)),
        ("optimizer, ms", _with_share),
        ("state, MB", lambda entry: digits(None if entry.state_bytes is None else entry.state_bytes / 1e6)),
    ]
    shown = [(head, [show(entry) for entry in entries]) for head, show in columns]
    shown = [(head, texts) for head, texts in shown if any(texts)]
    rows = zip(*(texts for _, texts in shown), strict=True)
    return _table("entries", (head for head, _ in shown), rows, (_entry_record(entry, metric) for entry in entries))


def _entry_record(entry: Entry, metric: Metric) -> Record:
    reach = entry.reach
    return {
        "entry": entry.label,
        "optimizer": entry.optimizer,
        "family": entry.family,
        "lr": entry.lr,
        "runs": len(entry.runs),
        **_interval_record(f"final_{metric.name}", entry.final),
        "finished": entry.final.count if entry.final else 0,
        f"best_{metric.name}": _best(entry, metric),
        **_interval_record(f"final_train_{metric.name}", entry.final_train),
        metric.other.name: _beside(entry),
        "steps_to_target": median_with_misses(reach.steps) if reach else None,
        "tokens_to_target": median_with_misses(reach.tokens) if reach else None,
        "seconds_to_target": median_with_misses(reach.seconds) if reach else None,
        "missed_target": reach.misses if reach else None,
        "step_ms": entry.step_ms,
        "optimizer_ms": entry.optimizer_ms,
        "state_bytes": entry.state_bytes,
        "diverged": entry.diverged,
    }


def evidence_table(comparison: Comparison) -> Table:
    """Return the table of the evidence rule, with a row per contender; without rows if there is no rule."""
    rule = comparison.evidence_rule
    name = "" if rule is None else rule.name
    texts, records = [], []
    for each in comparison.evidence:
        entry, final = each.entry, each.entry.final
        margin = "" if each.margin is None else f"{each.margin:+.4f}"
        needed = "" if final is None else "none is enough" if each.runs_needed is None else f"{each.runs_needed:,}"
        steps = entry.runs[0].steps
        mean = None if final is None else final.mean
        count = 0 if final is None else final.count
        texts.append(
            (
                entry.label,
                str(count),
                LOSS.text(mean),
                margin,
                each.outcome,
                needed,
                "" if steps is None else f"{steps:,}",
            )
        )
        records.append(
            {
                "entry": entry.label,
                "rule": name,
                "target": None if rule is None else rule.target,
                "threshold": None if rule is None else rule.threshold,
                "runs": count,
                "mean_loss": mean,
                "margin": each.margin,
                "outcome": each.outcome,
                "runs_needed": each.runs_needed,
                "steps": steps,
                "objections": "; ".join(each.objections) or None,
                "doubts": "; ".join(each.doubts) or None,
            }
        )
    heads = ("", "n", "mean loss", "margin", name, "n needed", "steps")
    return _table("evidence", heads, texts, records)


def verdict_table(comparison: Comparison, verdicts: Sequence[Verdict]) -> Table:
    """Return a table with a row per verdict."""
    metric = comparison.metric
    texts, records = [], []
    for verdict in verdicts:
        difference, needed = verdict.difference, _seeds_needed(verdict)
        p = "" if verdict.p is None else f"{verdict.p:.2g}"
        texts.append(
            (
                verdict.first,
                verdict.second,
                verdict.outcome,
                _difference(difference, metric),
                p,
                verdict.test or "",
                str(needed or ""),
            )
        )
        low, high = verdict.corrected or (None, None)
        records.append(
            {
                "first": verdict.first,
                "second": verdict.second,
                "outcome": verdict.outcome,
                "difference": None if difference is None else difference.mean,
                "low": None if difference is None else difference.low,
                "high": None if difference is None else difference.high,
                "p": verdict.p,
                "test": verdict.test,
                "corrected_low": low,
                "corrected_high": high,
                "seeds_needed": needed,
            }
        )
    heads = ("first", "second", "the first is", "first minus second", "p, corrected", "test", "seeds needed")
    return _table("verdicts", heads, texts, records)


def _seeds_needed(verdict: Verdict) -> int | str | None:
    needed = verdict.seeds_needed
    return f"more than {MOST_SEEDS}" if needed is not None and needed > MOST_SEEDS else needed


def run_table(comparison: Comparison) -> Table:
    """Return the table of all runs except trials of a search."""
    metric = comparison.metric
    runs = [(entry, index, run) for entry in comparison.entries for index, run in enumerate(entry.runs)]
    branched = any(run.lineage for _, _, run in runs)
    heads = ["run", "entry", "seed", "state", "step", f"final {metric.name}", f"best {metric.name}"]
    heads += ["why not finished", *["branch of"] * branched]
    texts = tuple(
        (
            run.name,
            entry.label,
            "" if run.seed is None else str(run.seed),
            run.state,
            f"{run.last_step:,}",
            metric.text(run.final),
            metric.text(run.best),
            run.reason or "",
            *[_parent(run) or ""] * branched,
        )
        for entry, _, run in runs
    )
    return _table("runs", heads, texts, (_run_record(*run, metric) for run in runs))


def _parent(run: Run) -> str | None:
    return printable(str(run.lineage[-1])) if run.lineage else None


def _run_record(entry: Entry, index: int, run: Run, metric: Metric) -> Record:
    reach = entry.reach
    return {
        "run": run.name,
        "entry": entry.label,
        "optimizer": entry.optimizer,
        "lr": entry.lr,
        "seed": run.seed,
        "state": run.state,
        "reason": run.reason,
        "step": run.last_step,
        "steps": run.steps,
        f"final_{metric.name}": run.final,
        f"best_{metric.name}": run.best,
        f"final_train_{metric.name}": run.final_train,
        metric.other.name: run.beside,
        "steps_to_target": reach.steps[index] if reach else None,
        "tokens_to_target": reach.tokens[index] if reach else None,
        "seconds_to_target": reach.seconds[index] if reach else None,
        "step_ms": run.step_ms,
        "optimizer_ms": run.optimizer_ms,
        "state_bytes": run.state_bytes,
        **{key: run.environment.get(key) for key in ("device", "instructions", "torch", "git_commit")},
        "branch_of": _parent(run),
    }


def _sensitivity_table(comparison: Comparison) -> Table:
    metric = comparison.metric
    texts, records = [], []
    for family in comparison.sensitivities:
        for point in family.points:
            mean = statistics.fmean(point.values) if point.values else None
            stopped = metric.best(point.unfinished)
            counts = (len(point.values), len(point.unfinished), point.diverged)
            texts.append((family.family, f"{point.lr:g}", metric.text(mean), metric.text(stopped), *map(str, counts)))
            records.append(
                {
                    "family": family.family,
                    "optimizer": family.optimizer,
                    "lr": point.lr,
                    f"final_{metric.name}": mean,
                    "lowest": min(point.values, default=None),
                    "highest": max(point.values, default=None),
                    f"best_{metric.name}_unfinished": stopped,
                    "finished": counts[0],
                    "unfinished": counts[1],
                    "diverged": counts[2],
                }
            )
    results = (f"final {metric.name}", f"best {metric.name} if unfinished")
    heads = ("", "lr", *results, "finished", "unfinished", "diverged")
    return _table("sensitivity", heads, texts, records)


def _setting_table(comparison: Comparison) -> Table:
    metric = comparison.metric
    texts, records = [], []
    for effect in comparison.setting_effects:
        for value, entry in zip(effect.values, effect.entries, strict=True):
            final = with_margin(entry.final, metric)
            lr = "" if entry.lr is None else f"{entry.lr:g}"
            texts.append((effect.setting, effect.label, f"{value:g}", lr, _seeds(entry), final))
            records.append(
                {
                    "setting": effect.setting,
                    "family": effect.label,
                    "value": value,
                    "lr": entry.lr,
                    "runs": len(entry.runs),
                    **_interval_record(f"final_{metric.name}", entry.final),
                    "finished": entry.final.count if entry.final else 0,
                    "diverged": entry.diverged,
                }
            )
    heads = ("setting", "of", "value", "lr", "seeds", f"final {metric.name}")
    return _table("settings", heads, texts, records)


def tuning_table(comparison: Comparison) -> Table:
    """Return the table of the best values after k trials: records for all k, texts for 1, 2, 4, ... and the last."""
    metric, tunings = comparison.metric, comparison.tunings
    most = max((each.counted for each in tunings), default=0)
    numbers = [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    columns = [("", [each.label for each in tunings]), ("trials", [str(len(each.trials)) for each in tunings])]
    for state in ("diverged", "unfinished"):
        counts = [sum(run.state == state for run in each.trials) for each in tunings]
        columns += [(state, [str(count or "") for count in counts])] * any(counts)
    for k in numbers:
        columns.append((f"best of {k}", [_best_of(k, each, metric) for each in tunings]))
    rows = zip(*(texts for _, texts in columns), strict=True)
    records = (record for each in tunings for record in _tuning_records(each, comparison.unit, metric))
    return _table("tuning", (head for head, _ in columns), rows, records)


def _best_of(k: int, tuning: Tuning, metric: Metric) -> str:
    return metric.text(tuning.best[k - 1]) if k <= tuning.counted else ""


def _tuning_records(tuning: Tuning, unit: str, metric: Metric) -> Iterable[Record]:
    for place, best in enumerate(tuning.best.tolist()):
        low, high = (None, None) if tuning.band is None else tuning.band[:, place].tolist()
        yield {
            "contender": tuning.label,
            "optimizer": tuning.optimizer,
            "trials": place + 1,
            unit: float(tuning.tokens[place]),
            "kind": "expected" if tuning.is_expected else "so far",
            f"best_{metric.name}": best,
            "low": low,
            "high": high,
        }


def tuning_cost_table(comparison: Comparison) -> Table:
    """Return the table of what the target costs with the trials; without rows if there is no target."""
    rows = [] if comparison.target is None else [each for each in comparison.tunings if each.entry is not None]
    rows.sort(key=lambda each: with_tuning(each, "tokens") or math.inf)
    units: dict[Literal["tokens", "seconds"], str] = {"tokens": comparison.unit, "seconds": "seconds"}
    texts, records = [], []
    for each in rows:
        cells, record = [each.label, str(len(each.trials))], {"contender": each.label, "trials": len(each.trials)}
        for unit, word in units.items():
            both = with_tuning(each, unit)
            cells += [
                digits(each.total(unit)),
                "" if each.entry is None else _to_target(each.entry, unit),
                digits(both),
            ]
            record |= {
                f"{word}_of_trials": each.total(unit),
                f"{word}_to_target": _reached(each, unit),
                f"{word}": both,
            }
        texts.append(tuple(cells))
        records.append(record)
    heads = [head for word in units.values() for head in (f"{word} of the trials", f"{word} to target", f"{word}, sum")]
    return _table("tuning_costs", ("", "trials", *heads), texts, records)


def with_tuning(tuning: Tuning, unit: Literal["tokens", "seconds"]) -> float | None:
    """Return what the trials and one run to the target take, the median over its seeds; None if it is missed."""
    reached = _reached(tuning, unit)
    return None if reached is None else tuning.total(unit) + reached


def _reached(tuning: Tuning, unit: Literal["tokens", "seconds"]) -> float | None:
    reach = None if tuning.entry is None else tuning.entry.reach
    return None if reach is None else median_with_misses(getattr(reach, unit))


def _trial_table(comparison: Comparison) -> Table:
    """Return the table of all trials of searches: the settings in which those of a contender differ, and the result."""
    settings = [[settings_of(run) for run in each.trials] for each in comparison.tunings]
    keys = dict.fromkeys(key for tables in settings for key in differing_keys(tables))
    records = [
        {
            "contender": each.label,
            "trial": run.name,
            "seed": run.seed,
            "state": run.state,
            "steps": run.steps,
            **{key: table.get(key) for key in keys},
            f"final_{comparison.metric.name}": run.final,
        }
        for each, tables in zip(comparison.tunings, settings, strict=True)
        for run, table in zip(each.trials, tables, strict=True)
    ]
    return _table("trials", (), (), records)


def _curve_table(comparison: Comparison) -> Table:
    """Return the table of all validations of all runs except trials of a search."""
    records = [
        {"run": run.name, "entry": entry.label, "seed": run.seed, **point}
        for entry in comparison.entries
        for run in entry.runs
        for point in _validations(run, comparison.unit, comparison.metric)
    ]
    return _table("curves", (), (), records)


def _validations(run: Run, unit: str, metric: Metric) -> list[Record]:
    """Return a run's validations, each with the smoothed training value at the same step or the last one before it."""
    val, train = run.val, run.smoothed
    places = np.searchsorted(train.steps, val.steps, side="right") - 1
    return [
        {
            "step": int(val.steps[index]),
            unit: whole(val.tokens[index]),
            "seconds": known(val.seconds[index]),
            f"val_{metric.name}": float(val.values[index]),
            f"train_{metric.name}": float(train.values[place]) if place >= 0 else None,
        }
        for index, place in enumerate(places)
    ]


def median_with_misses(values: Iterable[float | None]) -> float | None:
    """Return the median, where a miss counts as infinite: None if half of the values or more are misses."""
    median = statistics.median(math.inf if value is None else value for value in values)
    return None if math.isinf(median) else median


def digits(value: float | None) -> str:
    """Format a number with three digits, or all digits before the point; M and B for millions and billions."""
    if value is None:
        return ""
    for size, letter in ((1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:,.3g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def with_margin(interval: Interval | None, metric: Metric) -> str:
    """Format a mean and half of its interval."""
    if interval is None:
        return ""
    if interval.low is None or interval.high is None:
        return metric.text(interval.mean)
    return f"{metric.text(interval.mean)} ± {metric.text((interval.high - interval.low) / 2)}"


def _difference(interval: Interval | None, metric: Metric) -> str:
    """Format a difference and half of its interval."""
    if interval is None:
        return ""
    parts = [metric.difference(interval.mean, "+")]
    if interval.low is not None and interval.high is not None:
        parts.append(metric.difference((interval.high - interval.low) / 2))
    return " ± ".join(parts) + metric.difference_unit


def _seeds(entry: Entry) -> str:
    finished = entry.final.count if entry.final else 0
    return str(finished) if finished == len(entry.runs) else f"{finished} of {len(entry.runs)}"


def _to_target(entry: Entry, what: str) -> str:
    if entry.reach is None or not _is_recorded(entry, what):
        return ""
    middle, misses = median_with_misses(getattr(entry.reach, what)), entry.reach.misses
    if middle is None:
        return "missed" if misses == len(entry.runs) else f"{misses} of {len(entry.runs)} missed"
    return digits(middle) + (f" ({misses} missed)" if misses else "")


def _is_recorded(entry: Entry, what: str) -> bool:
    """Return whether the validations of any run have it, or there are none."""
    recorded = [getattr(run.val, what) for run in entry.runs if len(run.val.steps)]
    return not recorded or any(np.isfinite(values).any() for values in recorded)


def _with_share(entry: Entry) -> str:
    if entry.optimizer_ms is None or not entry.step_ms:
        return digits(entry.optimizer_ms)
    return f"{digits(entry.optimizer_ms)} ({entry.optimizer_ms / entry.step_ms:.0%})"


def _best(entry: Entry, metric: Metric) -> float | None:
    return metric.best(run.best for run in entry.runs if run.best is not None)


def _beside(entry: Entry) -> float | None:
    """Return the mean of the other metric over the finished runs' last validations."""
    known = [run.beside for run in entry.runs if run.final is not None and run.beside is not None]
    return statistics.fmean(known) if known else None


def _interval_record(name: str, interval: Interval | None) -> Record:
    values = (None,) * 4 if interval is None else (interval.mean, interval.low, interval.high, interval.std)
    keys = (name, f"{name}_low", f"{name}_high", f"{name}_std")
    return dict(zip(keys, values, strict=True))


def _escaped(text: str) -> str:
    """Escape Markdown and HTML: a folder's name may contain anything."""
    safe = text.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(safe.split())
