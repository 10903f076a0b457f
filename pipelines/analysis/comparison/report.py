"""The report of a comparison: a folder with a self-contained page, figures and tables."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.analysis.comparison.difference_figure import MOST_PAIRS
from pipelines.analysis.comparison.figures import (
    LAYERS_FOLDER,
    MOST_SHOWN,
    Abscissa,
    LayerFigures,
    axis_title,
    figure_names,
    has,
    shown,
    write_figures,
    write_layers,
)
from pipelines.analysis.comparison.headline import headline
from pipelines.analysis.comparison.results import Array, Band, Comparison, Curve, Entry, Outcome, Run, Verdict
from pipelines.analysis.comparison.tables import (
    TABLES,
    Table,
    entry_table,
    evidence_table,
    make_tables,
    run_table,
    tuning_cost_table,
    tuning_table,
    verdict_table,
)
from pipelines.analysis.comparison.tuning_words import tuning_words
from pipelines.analysis.comparison.until_certain import RECORD, Record, read_record
from pipelines.analysis.comparison.verdicts import by_pair
from pipelines.analysis.figure_style import plotly_line
from pipelines.analysis.page_template import COMPARISON, is_comparison, render
from pipelines.errors import UsageError
from pipelines.storage import staged_folder
from pipelines.tasks.metric import METRICS, Metric

MOST_RUNS = 30
"""Single runs in the curves; each has up to about 2,000 points."""

MOST_NUMBERS = 14
"""Contenders whose differences fit the page as numbers; for more, only the signs are shown."""

_DASH_WIDTH = 1.5
"""Line width, in pixels, for which dashes are computed; the page's lines are 0.8 to 2.5 wide."""
_ABSCISSAS: tuple[Abscissa, ...] = ("steps", "tokens", "seconds")

PAGE = "index.html"
_FIGURES = {name for metric in METRICS.values() for name in figure_names(metric)}
_OURS = {
    PAGE,
    "figures/",
    "tables/",
    *(f"figures/{name}{suffix}" for name in _FIGURES for suffix in (".png", ".pdf")),
    *(f"tables/{name}{suffix}" for name in TABLES for suffix in (".md", ".csv")),
}
_RECORDS = re.compile(rf"tables/(.+/|(.+/)?{re.escape(RECORD)})")
_LAYERS = re.compile(rf"figures/{LAYERS_FOLDER}/([^/]+/((layer|shadow)-[a-z]+\.(png|pdf|csv|md))?)?")


def check_report_folder(out: Path) -> None:
    """Raise `UsageError` unless `out` does not exist, is an empty folder, or contains only a report, to be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder; choose another --out")
    found = {path.relative_to(out).as_posix() + "/" * path.is_dir() for path in out.rglob("*")}
    if found and not is_comparison(out / PAGE):
        raise UsageError(f"{out}: exists and is not a report; choose another --out")
    others = {name for name in found - _OURS if not (_LAYERS.fullmatch(name) or _RECORDS.fullmatch(name))}
    if others:
        raise UsageError(f"{out}: contains {min(others)} beside a report; move it away, or choose another --out")


def write_report(comparison: Comparison, out: Path, command: str) -> Path:
    """Write the folder atomically, replacing an earlier report; return the page's path.

    Raises `UsageError` like `check_report_folder`. `command` is the command line that the page shows.
    """
    check_report_folder(out)
    with staged_folder(out.resolve(), replace=True) as staged:
        figures, tables = staged / "figures", staged / "tables"
        names = write_figures(comparison, figures)
        tables.mkdir()
        for table in make_tables(comparison):
            table.write(tables)
        for folder, record in _records(comparison).items():  # else a claim about the table of runs has the usual test
            (tables / folder).mkdir(parents=True, exist_ok=True)
            record.write(tables / folder)
        images = {name: (figures / f"{name}.png").read_bytes() for name in names}
        layers = write_layers(shown(comparison), figures)
        page = render_page(comparison, images, layers, _origin(comparison, command))
        (staged / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return the results as plain values for JSON."""
    target = comparison.target
    return {
        "headline": headline(comparison),
        "task": comparison.task,
        "confidence": comparison.confidence,
        "rule": comparison.rule,
        "target": None if target is None else {comparison.metric.name: target.value, "origin": target.origin},
        "contenders": [entry.label for entry in comparison.contenders],
        **{table.name: list(table.records) for table in make_tables(comparison) if table.texts},
        "lineage": {run.name: [each.model_dump() for each in run.lineage] for run in _runs(comparison) if run.lineage},
        "cautions": list(comparison.cautions),
    }


def _runs(comparison: Comparison) -> list[Run]:
    return [run for entry in comparison.entries for run in entry.runs]


def _records(comparison: Comparison) -> dict[str, Record]:
    """Return the records of sweeps until certain, by the folders of their runs in the table of runs."""
    folders = {run.name.rpartition("/")[0]: run.path.resolve().parent for run in _runs(comparison)}
    found = ((name, read_record(folder)) for name, folder in folders.items())
    return {name: record for name, record in found if record is not None}


def _origin(comparison: Comparison, command: str) -> list[tuple[str, str]]:
    runs = _runs(comparison)
    return [
        ("command", command),
        ("made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by asgo {version('asgo')}"),
        ("trained on", _listed(runs, "device")),
        ("code of the runs", _listed(runs, "git_commit")),
        ("torch of the runs", _listed(runs, "torch")),
    ]


def _listed(runs: Sequence[Run], key: str) -> str:
    return "; ".join(sorted({run.environment.get(key, "not recorded") for run in runs}))


@dataclass(frozen=True)
class Cell:
    """A row's contender compared with a column's: visible text and tooltip."""

    text: str
    outcome: Outcome | None
    details: str


def render_page(
    comparison: Comparison,
    images: Mapping[str, bytes],
    layers: Sequence[LayerFigures],
    origin: Sequence[tuple[str, str]],
) -> str:
    """Return the page as HTML. `images` are PNG files by names of `figure_names`; `origin` says how it was made."""
    contenders = shown(comparison)
    return render(
        Path(__file__).parent / "template",
        generator=COMPARISON,
        comparison=comparison,
        metric=comparison.metric,
        headline=headline(comparison),
        run_count=len(_runs(comparison)),
        final=entry_table(comparison, contenders),
        others=_other_entries(comparison),
        contenders=contenders,
        evidence=evidence_table(comparison),
        tuning=tuning_table(comparison),
        tuning_costs=tuning_cost_table(comparison),
        tuning_words=tuning_words(comparison),
        matrix=_matrix(comparison),
        verdicts=verdict_table(comparison, _shown_verdicts(comparison)),
        most_pairs=MOST_PAIRS,
        curves=_curves(comparison),
        abscissas=_abscissas_of(comparison),
        left_out=_left_out(comparison),
        runs=run_table(comparison),
        images={name: _base64(images[name]) for name in figure_names(comparison.metric) if name in images},
        layers=[
            (each.run, [(words, _base64(image)) for words, image in each.images], [t for t in each.tables if t.texts])
            for each in layers
        ],
        origin=origin,
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _other_entries(comparison: Comparison) -> Table | None:
    contenders = {entry.label for entry in shown(comparison)}
    others = [entry for entry in comparison.entries if entry.label not in contenders]
    return entry_table(comparison, others) if others else None


def _matrix(comparison: Comparison) -> list[tuple[str, list[Cell]]]:
    """Return the pairwise differences of contenders with a finished run; an empty list for fewer than two.

    A row has a cell for each of them, or only for the one that all others are tested against.
    """
    labels = [entry.label for entry in shown(comparison) if entry.final is not None]
    columns = labels if comparison.against is None else [comparison.against.label]
    verdicts = by_pair(comparison)
    brief = len(columns) > MOST_NUMBERS
    rows = [
        (first, [_cell(verdicts.get((first, second)), comparison.metric, brief) for second in columns])
        for first in labels
    ]
    return rows if len(rows) > 1 else []


def _shown_verdicts(comparison: Comparison) -> list[Verdict]:
    against = () if comparison.against is None else (comparison.against,)
    labels = {entry.label for entry in (*shown(comparison), *against)}
    return [verdict for verdict in comparison.verdicts if {verdict.first, verdict.second} <= labels]


def _cell(verdict: Verdict | None, metric: Metric, brief: bool) -> Cell:
    if verdict is None or verdict.difference is None:
        return Cell("", None, "")
    difference = verdict.difference
    mean = metric.difference(difference.mean, "+")
    ends = [metric.difference(end, "+") for end in (difference.low, difference.high) if end is not None]
    details = ", ".join(
        [
            f"{verdict.first} minus {verdict.second}: {mean}",
            *([" to ".join(ends)] if ends else []),
            *([f"p = {verdict.p:.2g}"] if verdict.p is not None else []),
        ]
    )
    text = mean.replace("-", "−")
    return Cell(text[0] if brief else text, verdict.outcome, f"{details}: {verdict.outcome}")


def _left_out(comparison: Comparison) -> list[str]:
    """Return sentences about what the curves leave out."""
    sentences = []
    contenders = shown(comparison)
    if len(contenders) < len(comparison.contenders):
        sentences.append(
            f"Curves, figures and differences show the first {MOST_SHOWN} of {len(comparison.contenders)} contenders."
        )
    runs = sum(len(entry.runs) for entry in contenders)
    if runs > MOST_RUNS:
        sentences.append(f"{MOST_RUNS} of the contenders' {runs} single runs are shown, diverged ones first.")
    return sentences


def _curves(comparison: Comparison) -> dict[str, Any]:
    """Return the data that the page's script draws; see `template/page.js`."""
    contenders = shown(comparison)
    singles = _single_runs(contenders)
    return {
        "titles": {name: axis_title(name, comparison.unit) for name in _abscissas_of(comparison)},
        "target": None if comparison.target is None else comparison.target.value,
        "contenders": [
            {
                # Plotly interprets labels as HTML.
                "label": html.escape(entry.label),
                "line": plotly_line(index, _DASH_WIDTH),
                "train": _band(entry.train),
                "val": _band(entry.val),
                "runs": [_run(run) for run in entry.runs if run.name in singles],
            }
            for index, entry in enumerate(contenders)
        ],
    }


def _abscissas_of(comparison: Comparison) -> list[Abscissa]:
    """Return the horizontal axes that a contender has, and the steps."""
    entries = shown(comparison)
    return [name for name in _ABSCISSAS if name == "steps" or any(has(entry, name) for entry in entries)]


def _single_runs(contenders: Sequence[Entry]) -> set[str]:
    runs = [run for entry in contenders for run in entry.runs]
    return {run.name for run in sorted(runs, key=lambda run: run.state != "diverged")[:MOST_RUNS]}


def _band(band: Band | None) -> dict[str, Any] | None:
    if band is None or not len(band.steps):
        return None
    return {
        **_abscissas(band),
        "mean": _numbers(band.mean),
        "lowest": _numbers(band.lowest),
        "highest": _numbers(band.highest),
    }


def _run(run: Run) -> dict[str, Any]:
    train = run.train.since(run.drawn_from)
    return {
        "name": html.escape(run.name),
        "diverged": run.state == "diverged",
        "train": {**_abscissas(train), "losses": _numbers(train.values)},
    }


def _abscissas(curve: Band | Curve) -> dict[str, list[float | None]]:
    return {name: _numbers(getattr(curve, name)) for name in _ABSCISSAS}


def _numbers(values: Array) -> list[float | None]:
    """Round to seven digits, to keep the page small; whole numbers (steps, tokens) stay exact. None if not finite."""
    return [_number(value) for value in np.asarray(values, np.float64).tolist()]


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.7g}")
