"""The pages of results: their tables are the files beside them, the files agree, and the sweeps can be run again."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import statistics
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

from asgo_cli.app import app
from models.functions import FUNCTIONS
from pipelines.analysis.comparison.until_certain import read_record
from pipelines.analysis.optimizer_settings import default_settings
from pipelines.analysis.trajectories import run_trajectories
from pipelines.resolve import assignment_layer
from pipelines.sweeps.definition import read_sweep, resolve_variants

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(RESULTS.glob("*.md"))
SWEEPS = sorted(RESULTS.glob("*/sweep.toml"))
TABLES = sorted(RESULTS.glob("*/entries.csv"))


def script(name: str) -> ModuleType:
    """A script of the results, as a module."""
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(RESULTS)) for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_the_tables_of_a_page_are_the_files_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert script("assemble").assembled(text) == text


def test_the_pages_show_what_there_is() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    }
    assert [path for path in linked if not path.exists()] == []
    assert set(RESULTS.rglob("*.csv")) <= linked
    assert {*PAGES} - {RESULTS / "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_loss_that_a_page_quotes_is_in_a_table(page: Path) -> None:
    """All figures with four decimals, and what follows ± or lies between two of them as a difference."""
    prose = re.sub(r"<!-- [\w./-]+ -->.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    tables = " ".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*/*.md"))
    known = set(re.findall(r"\d+\.\d{4}\b", tables))
    assert set(re.findall(r"(?<![\d.])\d\.\d{4}\b", prose)) <= known


def test_the_ngram_losses_are_those_of_counts_in_the_training_text() -> None:
    """Counted by hand: 1 is followed by 0 once, and so is 01; the validation text is one triple, 010."""
    train, validation = np.array([0, 1, 0, 1]), np.array([0, 1, 0])
    zero_after_one = (1 + 1) / (1 + 2)
    zero_after_both = (1 + 10 * zero_after_one) / (1 + 10)
    expected = -math.log(zero_after_one), -math.log(zero_after_both)
    assert script("ngrams").ngram_losses(train, validation) == pytest.approx(expected)


@pytest.mark.parametrize("table", TABLES, ids=names(TABLES))
def test_entries_runs_and_curves_agree(table: Path) -> None:
    runs, curves = rows(table.parent / "runs.csv"), rows(table.parent / "curves.csv")
    metric = "loss" if "final_loss" in runs[0] else "accuracy"
    final = f"final_{metric}"
    for run in runs:
        last = [row for row in curves if row["run"] == run["run"]][-1]
        assert run["state"] != "finished" or last[f"val_{metric}"] == run[final]
        assert run["step"] == run["steps"] or run["state"] == "diverged"
    for entry in rows(table):
        finals = [float(run[final]) for run in runs if run["entry"] == entry["entry"] and run[final]]
        assert len(finals) == int(entry["finished"])
        if finals:
            assert float(entry[final]) == pytest.approx(statistics.fmean(finals), abs=1e-12)


@pytest.mark.parametrize("sweep", SWEEPS, ids=names(SWEEPS))
def test_a_sweep_can_be_run_again(sweep: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["sweep", str(sweep), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("table", TABLES, ids=names(TABLES))
def test_the_results_are_those_of_the_sweep_beside_them(table: Path) -> None:
    sweep = tomllib.loads((table.parent / "sweep.toml").read_text())
    definition = read_sweep(str(table.parent / "sweep.toml"))
    variants = [variant.name for variant in resolve_variants(definition, assignment_layer([]))]
    found = {run["run"] for run in rows(table.parent / "runs.csv")}
    first = {f"{name}-s{seed}" for name in variants for seed in sweep["seeds"]}
    record = read_record(table.parent)  # of seeds until certain
    assert first <= found <= (first if record is None else {f"{name}-s{n}" for name in variants for n in record.seeds})
    assert {run["steps"] for run in rows(table.parent / "runs.csv")} == {str(sweep["training"]["steps"])}


def test_the_claims_are_answered_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    claims = sorted((RESULTS / "claims").glob("*.toml"))
    result = CliRunner().invoke(app, ["claim", *map(str, claims), "--table", str(tmp_path / "claims.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "claims.md").read_text() == (RESULTS / "claims/claims.md").read_text()


@pytest.mark.parametrize("name", ["abs_sum", "inseparable_l2"])
def test_the_trajectories_end_where_the_table_says(name: str) -> None:
    (function,) = [
        each
        for each in json.loads((RESULTS / "functions/functions.json").read_text())["functions"]
        if each["function"] == name
    ]
    for run, shown in zip(run_trajectories(FUNCTIONS[name], default_settings()), function["trajectories"], strict=True):
        assert shown["label"] == run.settings.label
        assert shown["final_point"] == pytest.approx(run.final_point, abs=1e-9)
        assert shown["late_distance"] == pytest.approx(run.late_distance, abs=1e-9)
        assert shown["steps_to_reach"] == run.steps_to_reach


def test_make_results_has_nothing_left_to_do() -> None:
    """Of measurements, that is: it assembles the pages again."""
    made = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.dev", "results"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "assemble.py" in made.stdout
    assert "sweep" not in made.stdout
    assert "viz" not in made.stdout
    assert "bench" not in made.stdout
