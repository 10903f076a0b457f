"""`asgo compare` as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from asgo_cli import console
from pipelines.analysis.comparison.figures import figure_names
from pipelines.analysis.comparison.report import check_report_folder
from pipelines.analysis.comparison.rules import RULES
from pipelines.errors import UsageError
from pipelines.tasks.metric import LOSS
from tests.command_lines import Result, asgo
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

FINALS = {"asgo": (3.0, 3.01, 3.02), "adamw": (3.2, 3.21, 3.25)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs`: two optimizers with three seeds each, and one run that was stopped."""
    folder = tmp_path_factory.mktemp("compare")
    for optimizer, finals in FINALS.items():
        for seed, final in enumerate(finals):
            path = folder / "runs" / f"{optimizer}-s{seed}"
            write_run(path, falling_to(final), [4.0] * 160, optimizer=optimizer, seed=seed)
    write_run(folder / "runs/muon", {0: 5.0, 80: 4.0}, [4.0] * 90, optimizer="muon")
    return folder


@pytest.fixture(scope="module")
def compared(folder: Path) -> Result:
    """The command, with a target, on a terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.data, "width", 80)
        return asgo("compare", "runs", "--target", "3.1", folder=folder)


def test_the_terminal_tells_who_won_and_where_the_report_is(compared: Result) -> None:
    assert compared.code == 0, compared.err
    row = next(line for line in compared.out.splitlines() if line.startswith("│ asgo"))
    assert [cell.strip() for cell in row.strip("│").split("│")][:2] == ["asgo", "3"]
    assert f"{np.mean(FINALS['asgo']):.4f} ± " in row
    assert max(map(len, compared.out.splitlines())) <= 80
    *warnings, won, page, following = compared.err.splitlines()
    assert any(line.startswith("warning: ") and "muon (at step 90 of 160)" in line for line in warnings)
    assert won.startswith("asgo wins: it ends at 3.0100, 0.2100 (95% interval")
    assert page == "report/index.html: the report; figures and tables are in the same folder"
    assert following == "next: python -m webbrowser report/index.html"


def test_the_report_holds_the_page_the_figures_and_the_tables(folder: Path, compared: Result) -> None:
    assert compared.code == 0, compared.err
    report = folder / "report"
    assert "asgo compare runs --target 3.1" in (report / "index.html").read_text(encoding="utf-8")
    drawn = {path.stem for path in (report / "figures").iterdir()}
    assert drawn == {*figure_names(LOSS)} - {"sensitivity", "settings", "tuning-budget"}
    with (report / "tables/entries.csv").open() as file:
        rows = {row["entry"]: row for row in csv.DictReader(file)}
    for optimizer, finals in FINALS.items():
        assert float(rows[optimizer]["final_loss"]) == pytest.approx(np.mean(finals), rel=1e-12)
    assert rows["adamw"]["steps_to_target"] == ""
    assert (report / "tables/runs.md").read_text(encoding="utf-8").startswith("| run | entry | seed |")


def test_json_is_the_numbers_and_replaces_an_earlier_report(folder: Path, compared: Result) -> None:
    before = (folder / "report/index.html").stat().st_mtime_ns
    result = asgo("compare", "runs/asgo-s0", "runs/adamw-s0", "--json", "--confidence", "0.9", folder=folder)
    numbers = json.loads(result.out)
    assert numbers["contenders"] == ["asgo", "adamw"]
    assert [row["final_loss"] for row in numbers["entries"]] == [3.0, 3.2]
    assert numbers["verdicts"][0]["outcome"] == "cannot tell"
    assert (numbers["confidence"], numbers["target"]["loss"]) == (0.9, 3.2)
    assert (folder / "report/index.html").stat().st_mtime_ns > before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_rule_has_a_table_and_a_line_for_each_reason(tmp_path: Path) -> None:
    terms = {key.replace(".", "__"): value for key, value in RULES["track3"].settings.items()}
    for seed, final in enumerate((3.274, 3.275)):
        write_run(tmp_path / f"runs/muon-s{seed}", falling_to(final), optimizer="muon", seed=seed, **terms)
    terms["data__order"] = "shuffled"
    write_run(tmp_path / "runs/asgo", falling_to(3.2), optimizer="asgo", **terms)
    result = asgo("compare", "runs", "--rule", "track3", folder=tmp_path)
    assert result.code == 0, result.err
    table = result.out[result.out.index("margin") :]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if "│" in line]
    assert ["muon", "2", "3.2745", "+0.0078", "met", "1", "160"] in rows
    assert max(map(len, result.out.splitlines())) <= 80
    reasons = [line.partition("track3: ")[2] for line in result.err.splitlines() if "warning: track3: " in line]
    assert reasons == [
        "asgo order=shuffled does not qualify: data.order is shuffled, and the rule needs sequential.",
        "asgo order=shuffled: a single run; more runs, with seeds fixed in advance, are better evidence.",
    ]
    assert "Rule track3: (3.28 − mean final loss) · √n ≥ 0.004 over all n runs" in result.err


def test_images_are_compared_by_accuracy_and_text_cannot_be(folder: Path, tmp_path: Path) -> None:
    for optimizer, final in (("asgo", 0.9), ("adamw", 0.8)):
        settings = {"task": "images", "optimizer": optimizer, "training__steps": 160}
        write_run(tmp_path / f"runs/{optimizer}", falling_to(3.0), accuracy={0: 0.001, 160: final}, **settings)  # type: ignore[arg-type]
    result = asgo("compare", "runs", "--target", "0.85", folder=tmp_path)
    assert result.code == 0, result.err
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.out.splitlines() if "│" in line]
    assert [row[:4] for row in rows] == [["asgo", "1", "90.00%", "160"], ["adamw", "1", "80.00%", "missed"]]
    assert "asgo ends highest, at 90.00%, 10.00 points above adamw" in result.err
    assert (tmp_path / "report/figures/final-accuracies.pdf").is_file()
    again = asgo("compare", "runs", "--metric", "loss", folder=tmp_path)
    assert again.code == 0, again.err
    assert not (tmp_path / "report/figures/final-accuracies.pdf").exists()
    assert (tmp_path / "report/figures/final-losses.pdf").is_file()

    refused = asgo("compare", "runs", "--metric", "accuracy", "--out", "new", folder=folder)
    assert refused.code == 2
    assert refused.err == "error: --metric accuracy: the task gpt records no accuracy; choose loss\n"


def test_what_is_not_a_report_stays_as_it_is(folder: Path) -> None:
    kept = (folder / "runs/muon/metrics.jsonl").read_bytes()
    result = asgo("compare", "runs", "--out", "runs", folder=folder)
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: runs: exists and is not a report; choose another --out\n"
    assert (folder / "runs/muon/metrics.jsonl").read_bytes() == kept


def test_a_report_with_something_of_the_users_in_it_is_not_replaced(folder: Path, compared: Result) -> None:
    note = folder / "report/figures/mine.png"
    note.touch()
    with pytest.raises(UsageError, match=r"report: contains figures/mine.png beside a report; move it away, or"):
        check_report_folder(folder / "report")
    note.unlink()
    check_report_folder(folder / "report")
    (folder / "file").touch()
    with pytest.raises(UsageError, match=r"file: exists and is not a folder; choose another --out"):
        check_report_folder(folder / "file")


def test_a_path_without_runs_is_one_line(folder: Path) -> None:
    result = asgo("compare", "nowhere", "--out", "new", folder=folder)
    assert result.code == 2
    assert result.err == "error: nowhere: no such folder or log; give runs, logs, or folders of them\n"
    assert not (folder / "new").exists()
