"""A benchmark's evidence rule: its arithmetic, and the runs that it does not accept."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import summary, write_report
from pipelines.analysis.comparison.results import Comparison, Evidence, Target
from pipelines.analysis.comparison.rules import RULES
from pipelines.errors import UsageError
from pipelines.training.lineage import Ancestor
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

TRACK3 = RULES["track3"]
TERMS: dict[str, Any] = {key.replace(".", "__"): value for key, value in TRACK3.settings.items()}


def write_runs(folder: Path, *finals: float, optimizer: str = "muon", **changes: Any) -> Path:
    """Finished runs within the rules but for `changes`, with the seeds 1, 2, ..."""
    settings = {key: value for key, value in {**TERMS, **changes}.items() if value is not None}
    steps = settings.get("training__steps", 160)
    for seed, final in enumerate(finals, start=1):
        write_run(folder / f"{optimizer}-s{seed}", falling_to(final, steps), optimizer=optimizer, seed=seed, **settings)
    return folder


def judged(*folders: Path) -> Comparison:
    return compare_runs(folders, evidence_rule="track3")


def only(comparison: Comparison) -> Evidence:
    (found,) = comparison.evidence
    return found


@pytest.mark.parametrize(
    ("finals", "outcome", "needed"),
    [
        ((3.276,), "met", 1),
        ((3.2761,), "not met", 2),
        ((3.2761, 3.2761), "met", 2),
        ((3.2770, 3.2782), "not met", 3),  # mean 3.2776: (0.004 / 0.0024)² = 2.8
        ((3.278,) * 4, "met", 4),
        ((3.278,) * 3, "not met", 4),
        ((3.28, 3.28), "not met", None),
        ((3.29, 3.28), "not met", None),
    ],
)
def test_the_rule_is_its_formula(finals: tuple[float, ...], outcome: str, needed: int | None, tmp_path: Path) -> None:
    found = only(judged(write_runs(tmp_path, *finals)))
    assert (found.outcome, found.runs_needed, found.objections) == (outcome, needed, ())
    n, mean = len(finals), sum(finals) / len(finals)
    assert found.margin == pytest.approx((3.28 - mean) * math.sqrt(n))
    if needed is not None:
        assert TRACK3.is_met(mean, needed)
        assert not TRACK3.is_met(mean, needed - 1)


def test_the_target_to_reach_is_that_of_the_rule(tmp_path: Path) -> None:
    write_runs(tmp_path, 3.27, 3.27)
    assert judged(tmp_path).target == Target(3.28, "the target of track3")
    assert compare_runs([tmp_path], 3.5, evidence_rule="track3").target == Target(3.5, "asked for")
    assert compare_runs([tmp_path]).evidence == ()


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"data__order": "shuffled"}, "data.order is shuffled, and the rule needs sequential"),
        ({"training__batch_size": 256}, "training.batch_size is 256, and the rule needs 512"),
        ({"evaluation__tokens": 5_242_880}, "evaluation.tokens is 5242880, and the rule needs 10485760"),
        (
            {"evaluation__tokens": None, "evaluation__batches": 8},
            "evaluation.tokens is not set, and the rule needs 10485760",
        ),
        ({"model__context_length": 512}, "model.context_length is 512, and the rule needs 1024"),
        (
            {"lineage": [Ancestor(run="trunk", step=80, sha256="0" * 64, optimizer="muon")]},
            "branches are not independent runs",
        ),
    ],
)
def test_runs_outside_the_rules_do_not_qualify(changes: dict[str, Any], objection: str, tmp_path: Path) -> None:
    comparison = judged(write_runs(tmp_path, 3.2, 3.2, **changes))
    assert (only(comparison).outcome, only(comparison).objections) == ("does not qualify", (objection,))
    assert f"track3: muon does not qualify: {objection}." in comparison.cautions


def test_runs_that_are_left_out_or_repeated_do_not_qualify(tmp_path: Path) -> None:
    write_runs(tmp_path, 3.2, 3.2)
    write_run(tmp_path / "stopped", {0: 5.0, 80: 4.0}, optimizer="muon", seed=7, **TERMS)
    write_run(tmp_path / "diverged", {0: 5.0, 160: 6.0}, optimizer="muon", seed=8, **TERMS)
    write_run(tmp_path / "again", falling_to(3.2), optimizer="muon", seed=2, **TERMS)
    write_run(tmp_path / "lost", falling_to(3.2), optimizer="muon", seed=9, **TERMS)
    (tmp_path / "lost" / "config.json").write_text("{")
    comparison = judged(tmp_path)
    assert only(comparison).objections == (
        "runs without a final loss, and the rule takes all: stopped (unfinished), diverged (diverged)",
        "several runs of seed 2 are not independent",
    )
    assert "track3: runs that cannot be read are left out, and the rule takes all." in comparison.cautions


def test_a_single_run_and_several_stopping_steps_are_doubts(tmp_path: Path) -> None:
    write_runs(tmp_path / "short", 3.3, 3.3)
    write_runs(tmp_path / "long", 3.2, training__steps=200)
    write_runs(tmp_path / "other", 3.2, 3.2, optimizer="asgo", training__steps=200)
    comparison = judged(tmp_path)
    found = {each.entry.label: (each.outcome, each.doubts) for each in comparison.evidence}
    also = "the same settings have runs of {} steps too, and the stopping step must be fixed in advance"
    assert found == {
        "asgo steps=200": ("met", ()),
        "muon steps=200": (
            "met",
            ("a single run; more runs, with seeds fixed in advance, are better evidence", also.format(160)),
        ),
        "muon steps=160": ("not met", (also.format(200),)),
    }
    assert f"track3: muon steps=160: {also.format(200)}." in comparison.cautions


def test_it_is_in_the_summary_the_tables_and_the_page(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", 3.27, 3.276)
    write_runs(tmp_path / "runs", 3.279, 3.278, optimizer="asgo")
    write_run(tmp_path / "runs" / "adamw", {0: 5.0, 80: 4.0}, **TERMS)
    comparison = judged(tmp_path / "runs")
    rows = {row["entry"]: row for row in summary(comparison)["evidence"]}
    assert rows["muon"] == {
        "entry": "muon", "rule": "track3", "target": 3.28, "threshold": 0.004, "runs": 2,
        "mean_loss": pytest.approx(3.273), "margin": pytest.approx(0.007 * math.sqrt(2)), "outcome": "met",
        "runs_needed": 1, "steps": 160, "objections": None, "doubts": None,
    }  # fmt: skip
    assert (rows["asgo"]["outcome"], rows["asgo"]["runs_needed"]) == ("not met", 8)
    assert (rows["adamw"]["outcome"], rows["adamw"]["mean_loss"]) == ("does not qualify", None)
    page = write_report(comparison, tmp_path / "report", "asgo compare").read_text(encoding="utf-8")
    assert "<td>muon</td><td>2</td><td>3.2730</td><td>+0.0099</td><td>met</td><td>1</td><td>160</td>" in page
    assert TRACK3.sentence in page
    assert "track3: adamw does not qualify: runs without a final loss" in page
    with (tmp_path / "report" / "tables" / "evidence.csv").open() as file:
        assert [row["entry"] for row in csv.DictReader(file)] == ["muon", "asgo", "adamw"]
    write_report(compare_runs([tmp_path / "runs"]), tmp_path / "report", "asgo compare")
    assert not (tmp_path / "report" / "tables" / "evidence.csv").exists()


def test_an_unknown_rule_is_one_line(tmp_path: Path) -> None:
    known = "track3, and files with the suffix .toml"
    with pytest.raises(UsageError, match=rf"^--rule track4: unknown rule; known: {known}$"):
        compare_runs([tmp_path], evidence_rule="track4")


def test_a_file_may_have_the_rule(tmp_path: Path) -> None:
    rule = tmp_path / "mine.toml"
    terms = '"data.order" = "sequential"\ntraining.batch_size = 512\n'
    rule.write_text(f"target = 2.5\nthreshold = 0.02\n[settings]\n{terms}")
    runs = write_runs(tmp_path / "runs", 2.48, 2.49)
    write_runs(tmp_path / "runs", 2.48, 2.48, optimizer="adamw", training__batch_size=256)
    comparison = compare_runs([runs], evidence_rule=str(rule))
    found = {each.entry.optimizer: (each.outcome, each.runs_needed) for each in comparison.evidence}
    assert found == {"muon": ("met", 2), "adamw": ("does not qualify", 1)}
    (caution,) = (each for each in comparison.cautions if each.startswith("mine: adamw"))
    assert caution.endswith("does not qualify: training.batch_size is 256, and the rule needs 512.")
    assert comparison.target == Target(2.5, "the target of mine")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory"),
        ("target = 3.28", "threshold is missing"),
        ("target = 3.28\nthreshold = 0", "threshold = 0: should be greater than 0"),
        ("target = 3.28\nthreshold = 0.1\nsteps = 5", "steps: unknown key"),
        ("target = ", "not valid TOML: Invalid value"),
    ],
)
def test_a_file_without_a_rule_is_one_line(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(tmp_path / 'mine.toml'))}: {problem}[^\n]*$"):
        compare_runs([tmp_path], evidence_rule=str(tmp_path / "mine.toml"))
