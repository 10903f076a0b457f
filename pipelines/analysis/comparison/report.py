"""The report of a comparison as a folder: the page, the figures and the tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.analysis.comparison.figures import FIGURES, shown, write_figures
from pipelines.analysis.comparison.headline import headline
from pipelines.analysis.comparison.layers import FOLDER, write_layers
from pipelines.analysis.comparison.page import GENERATOR, render_page
from pipelines.analysis.comparison.results import Comparison, Run
from pipelines.analysis.comparison.tables import TABLES, make_tables
from pipelines.errors import UsageError
from pipelines.storage import staged_folder

PAGE = "index.html"
_OURS = {
    PAGE,
    "figures/",
    "tables/",
    *(f"figures/{name}{suffix}" for name in FIGURES for suffix in (".png", ".pdf")),
    *(f"tables/{name}{suffix}" for name in TABLES for suffix in (".md", ".csv")),
}


_LAYERS = re.compile(rf"figures/{FOLDER}/([^/]+/(layer-[a-z]+\.(png|pdf))?)?")


def check_report_folder(out: Path) -> None:
    """`UsageError` unless there is nothing at `out`, an empty folder, or a report alone, which may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder; choose another --out")
    found = {path.relative_to(out).as_posix() + "/" * path.is_dir() for path in out.rglob("*")}
    if found and not _is_report(out / PAGE):
        raise UsageError(f"{out}: exists and is not a report; choose another --out")
    others = {name for name in found - _OURS if not _LAYERS.fullmatch(name)}
    if others:
        raise UsageError(f"{out}: holds {min(others)} beside a report; move it away, or choose another --out")


def _is_report(page: Path) -> bool:
    try:
        with page.open(encoding="utf-8") as file:
            return GENERATOR in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def write_report(comparison: Comparison, out: Path, command: str) -> Path:
    """Write the folder, as a whole or not at all, in the place of an earlier report; returns the page's path.

    Raises `UsageError` if something else is there. `command` is how the comparison was asked for.
    """
    check_report_folder(out)
    with staged_folder(out.resolve(), replace=True) as staged:
        figures, tables = staged / "figures", staged / "tables"
        names = write_figures(comparison, figures)
        tables.mkdir()
        for table in make_tables(comparison):
            if table.texts:
                (tables / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
            (tables / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
        images = {name: (figures / f"{name}.png").read_bytes() for name in names}
        layers = write_layers(shown(comparison), figures)
        page = render_page(comparison, images, layers, _origin(comparison, command))
        (staged / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def summary(comparison: Comparison) -> dict[str, Any]:
    """The numbers as plain values, for programs."""
    target = comparison.target
    return {
        "headline": headline(comparison),
        "task": comparison.task,
        "confidence": comparison.confidence,
        "rule": comparison.rule,
        "target": None if target is None else {"loss": target.loss, "origin": target.origin},
        "contenders": [entry.label for entry in comparison.contenders],
        **{table.name: list(table.records) for table in make_tables(comparison) if table.texts},
        "cautions": list(comparison.cautions),
    }


def _origin(comparison: Comparison, command: str) -> list[tuple[str, str]]:
    runs = [run for entry in comparison.entries for run in entry.runs]
    return [
        ("command", command),
        ("made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by asgo {version('asgo')}"),
        ("trained on", _listed(runs, "device")),
        ("code of the runs", _listed(runs, "git_commit")),
        ("torch of the runs", "; ".join(sorted({_torch(run) for run in runs}))),
    ]


def _listed(runs: Sequence[Run], key: str) -> str:
    return "; ".join(sorted({str(run.environment.get(key) or "not recorded") for run in runs}))


def _torch(run: Run) -> str:
    versions = run.environment.get("versions")
    return str(versions.get("torch") or "not recorded") if isinstance(versions, dict) else "not recorded"
