"""A branch is drawn from where it parts from its parent; its numbers are those of the whole run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.analysis.comparison import figures
from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import summary, write_report
from pipelines.analysis.comparison.results import Comparison, Run
from pipelines.training.lineage import Ancestor
from tests.pipelines.analysis.comparison.run_folders import write_run

TRUNK = {0: 5.0, 40: 4.0, 80: 3.5, 120: 3.3, 160: 3.2}
TRAIN = [4.0] * 160


def ancestor(run: str, step: int, optimizer: str = "adamw") -> Ancestor:
    return Ancestor(run=run, step=step, sha256="0" * 64, optimizer=optimizer)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A trunk; a branch of it at step 80, a branch of that one at 120, and a run of its own with other losses."""
    folder = tmp_path / "runs"
    write_run(folder / "trunk", TRUNK, TRAIN)
    first, second = ancestor("anywhere/trunk", 80), ancestor("anywhere/one", 120)
    one, two = {**TRUNK, 120: 3.1, 160: 3.0}, {**TRUNK, 120: 3.1, 160: 2.9}
    write_run(folder / "one", one, TRAIN, schedule__kind="linear", lineage=[first])
    write_run(folder / "two", two, TRAIN, schedule__kind="linear", optimizer="asgo", lineage=[first, second])
    write_run(folder / "other" / "trunk", {**TRUNK, 40: 4.4}, TRAIN, optimizer="muon")
    return folder


def runs_of(comparison: Comparison) -> dict[str, Run]:
    return {run.name: run for entry in comparison.entries for run in entry.runs}


def test_a_branch_is_drawn_from_where_it_parts(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare_runs([study])
    drawn = {run.name: run.drawn_from for run in runs_of(comparison).values()}
    assert drawn == {"trunk": 0, "one": 80, "two": 120, "other/trunk": 0}
    kept = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: kept.setdefault(path.stem, figure))
    figures.write_figures(comparison, tmp_path)
    lines = [list(line.get_xdata()) for line in kept["loss-steps"].axes[1].lines]
    assert [120, 160] in lines
    assert [80, 120, 160] in lines
    assert lines.count([0, 40, 80, 120, 160]) == 2


def test_without_its_parent_a_branch_is_drawn_whole_or_from_an_older_one(study: Path) -> None:
    alone = runs_of(compare_runs([study / "two", study / "other"]))
    assert alone["two"].drawn_from == 0, "a run of the parent's name with other losses is not the parent"
    assert runs_of(compare_runs([study / "two", study / "trunk"]))["two"].drawn_from == 80


def test_the_numbers_are_those_of_the_whole_run(study: Path, tmp_path: Path) -> None:
    comparison = compare_runs([study], target=3.6)
    write_report(comparison, tmp_path / "report", "asgo compare")
    results = json.loads(json.dumps(summary(comparison)))
    by_name = {record["run"]: record for record in results["runs"]}
    assert by_name["two"]["steps_to_target"] == 80
    assert (by_name["two"]["branch_of"], by_name["trunk"]["branch_of"]) == ("anywhere/one@120", None)
    assert results["lineage"]["two"] == [
        ancestor("anywhere/trunk", 80).model_dump(),
        ancestor("anywhere/one", 120).model_dump(),
    ]
    assert set(results["lineage"]) == {"one", "two"}
    curves = (tmp_path / "report" / "tables" / "curves.csv").read_text()
    assert sum(line.startswith("two,") for line in curves.splitlines()) == 5
    assert "anywhere/one@120" in (tmp_path / "report" / "tables" / "runs.md").read_text()
    (caution,) = [line for line in comparison.cautions if "branches" in line]
    assert caution.endswith(": branches; their steps, tokens and seconds include what their parents trained.")


def test_the_time_of_a_step_is_that_of_the_branchs_own_steps(study: Path) -> None:
    runs = runs_of(compare_runs([study]))
    assert runs["trunk"].step_ms == np.median([500 + step for step in range(1, 161)])
    assert runs["two"].step_ms == np.median([500 + step for step in range(121, 161)])


def test_a_branch_is_no_seed_of_the_runs_with_its_settings(tmp_path: Path) -> None:
    """AdamW after 80 steps of Muon is not AdamW; branches of several seeds are one entry."""
    for seed in (0, 1):
        write_run(tmp_path / f"adamw-{seed}", TRUNK, TRAIN, seed=seed)
        lineage = [ancestor(f"runs/muon-{seed}", 80, "muon")]
        write_run(tmp_path / f"branch-{seed}", {**TRUNK, 160: 3.0}, TRAIN, seed=seed, lineage=lineage)
    entries = {entry.label: len(entry.runs) for entry in compare_runs([tmp_path]).entries}
    assert entries == {"adamw branch=no": 2, "adamw branch=muon@80": 2}


def test_a_damaged_lineage_leaves_the_run_out(study: Path) -> None:
    path = study / "one" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lineage": [{"run": 3}]}))
    comparison = compare_runs([study])
    assert "one" not in runs_of(comparison)
    assert any("one/config.json: its lineage is not one that asgo wrote" in line for line in comparison.cautions)
