"""Warnings about what logs of other programs do not say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.analysis.comparison.cautions import by_value, some
from pipelines.analysis.comparison.results import Entry, Run, Verdict
from pipelines.tasks.metric import Metric


def log_cautions(entries: Sequence[Entry], verdicts: Sequence[Verdict], metric: Metric) -> list[str]:
    """Return the warnings about the runs that are read from logs."""
    logs = [entry for entry in entries if entry.runs[0].config is None]
    runs = [run for entry in logs for run in entry.runs]
    return [
        *_settings(runs),
        *by_value("Different amounts of training", logs, _end, f"final {metric.plural} do not compare"),
        *_lengths(runs),
        *_seeds(runs),
        *_pairs(logs, verdicts),
    ]


def _settings(runs: Sequence[Run]) -> Iterator[str]:
    if runs:
        yield (
            "Read from logs, which do not say model, data, validation, batch size and learning rate: "
            f"{some(run.name for run in runs)}; a difference may be theirs, not the optimizer's."
        )


def _end(run: Run) -> str:
    return f"last validation at step {run.val.steps[-1]:,.0f}" if run.final is not None else ""


def _lengths(runs: Sequence[Run]) -> Iterator[str]:
    names = [run.name for run in runs if run.steps is None and run.final is not None]
    if names:
        yield f"The log does not say how long the run is, so its last validation is the final one: {some(names)}."


def _seeds(runs: Sequence[Run]) -> Iterator[str]:
    names = [run.name for run in runs if run.seed is None]
    if names:
        yield (
            f"No seed in the log or its name: {some(names)}; their tests are not paired, and a run that is there twice "
            "counts twice."
        )


def _pairs(logs: Sequence[Entry], verdicts: Sequence[Verdict]) -> Iterator[str]:
    labels = {entry.label for entry in logs}
    paired = [each for each in verdicts if each.test == "paired" and {each.first, each.second} <= labels]
    if paired:
        names = some(label for each in paired for label in (each.first, each.second))
        yield (
            f"Paired by seed, though logs do not say that runs of one seed share initialization and batches: {names}; "
            "if they do not, the tests are sound, but decide fewer pairs."
        )
