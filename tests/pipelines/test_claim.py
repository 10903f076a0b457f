"""Claims: the statement is tested as it is written, checked against scipy and against a known truth."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from scipy import stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import write_report
from pipelines.analysis.comparison.t_tests import interval
from pipelines.analysis.comparison.until_certain import Record
from pipelines.analysis.comparison.verdicts import Side
from pipelines.claim import Claim, Judgement, Statement, _judged, _Pair, judge_claim, read_claim
from pipelines.errors import AsgoError, UsageError
from pipelines.tasks.metric import ACCURACY, LOSS
from pipelines.training.run_folder import RunFolder
from tests.pipelines.analysis.comparison.run_folders import falling_to, record_divergence, write_run

ASGO = [3.00, 3.02, 3.01, 3.015]
ADAMW = [3.05, 3.06, 3.08, 3.05]


def claim_of(**changes: Any) -> Claim:
    confidence = changes.pop("confidence", 0.95)
    statement = {"contender": "asgo", "better_than": "adamw", **changes}
    return Claim.model_validate({"sweep": "any.toml", "confidence": confidence, "statement": statement})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of two contenders with four common seeds."""
    for optimizer, finals in (("asgo", ASGO), ("adamw", ADAMW)):
        for seed, final in enumerate(finals, start=1):
            write_run(tmp_path / "runs" / f"{optimizer}-s{seed}", falling_to(final), optimizer=optimizer, seed=seed)
    return tmp_path / "runs"


def surplus_of(found: Judgement) -> tuple[float, float, float]:
    assert found.surplus is not None
    low, high = found.surplus.low, found.surplus.high
    assert low is not None
    assert high is not None
    return found.surplus.mean, low, high


@pytest.mark.parametrize(
    ("changes", "limits", "answer"),
    [
        ({}, np.array(ADAMW), "holds"),
        ({"by": 0.01}, np.array(ADAMW) - 0.01, "holds"),
        ({"by": 0.045}, np.array(ADAMW) - 0.045, "cannot tell"),
        ({"by": 0.2}, np.array(ADAMW) - 0.2, "does not hold"),
        ({"by": "1 %"}, np.array(ADAMW) * 0.99, "cannot tell"),
        ({"better_than": None, "no_worse_than": "adamw", "by": "2%"}, np.array(ADAMW) * 1.02, "holds"),
    ],
)
def test_the_test_is_the_paired_one_of_the_statement(
    changes: dict[str, Any], limits: Any, answer: str, folder: Path
) -> None:
    """The differences by seed between the limit and the contender, with scipy's interval of their mean."""
    found = judge_claim(claim_of(**changes), folder)
    expected = stats.ttest_rel(limits, ASGO)
    bounds = expected.confidence_interval(0.95)
    assert (found.answer, found.test, found.metric) == (answer, "paired", LOSS)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert surplus_of(found) == pytest.approx((np.mean(limits - ASGO), bounds.low, bounds.high), rel=1e-6)
    assert found.contender is not None
    assert found.reference is not None
    assert [found.contender.mean, found.reference.mean] == pytest.approx([np.mean(ASGO), np.mean(ADAMW)])
    assert (found.seeds_needed is not None) == (answer == "cannot tell")


def test_of_accuracies_the_higher_is_better(tmp_path: Path) -> None:
    right = {"muon": (0.71, 0.73, 0.72), "adamw": (0.61, 0.62, 0.66)}
    for optimizer, finals in right.items():
        for seed, final in enumerate(finals, start=1):
            accuracy = {0: 0.1, 305305: final}
            write_run(
                tmp_path / f"{optimizer}-s{seed}", {0: 5.0, 305305: 2.0}, task="images", optimizer=optimizer,
                seed=seed, accuracy=accuracy,
            )  # fmt: skip
    found = judge_claim(claim_of(contender="muon", by=0.02), tmp_path)
    bounds = stats.ttest_rel(right["muon"], np.array(right["adamw"]) + 0.02).confidence_interval(0.95)
    assert (found.answer, found.metric) == ("holds", ACCURACY)
    assert surplus_of(found)[1:] == pytest.approx((bounds.low, bounds.high), rel=1e-6)
    no_worse = claim_of(contender="adamw", better_than=None, no_worse_than="muon", by=0.02)
    assert judge_claim(no_worse, tmp_path).answer == "does not hold"


def test_other_seeds_are_tested_unpaired(folder: Path) -> None:
    (folder / "asgo-s4").rename(folder.parent / "away")
    found = judge_claim(claim_of(by=0.01), folder)
    expected = stats.ttest_ind(np.array(ADAMW) - 0.01, ASGO[:3], equal_var=False)
    assert (found.test, found.p) == ("Welch", pytest.approx(expected.pvalue, rel=1e-6))


def test_a_claim_on_the_border_rarely_holds() -> None:
    """At a confidence of 95 %, in at most 2.5 % of simulated studies, and rarely does not hold, up to three errors."""
    random, studies, answers = np.random.default_rng(1), 2000, []
    claim = claim_of(by=0.1)
    for _ in range(studies):
        reference = random.normal(3.0, 0.05, 5)
        contender = reference - 0.1 + random.normal(0.0, 0.02, 5)
        asgo, adamw = (
            Side(name, interval(values, 0.95), tuple(values), (1, 2, 3, 4, 5), "")  # type: ignore[arg-type]
            for name, values in (("asgo", contender.tolist()), ("adamw", reference.tolist()))
        )
        answers.append(_judged(claim, _Pair(LOSS, (asgo, adamw), (False, False))).answer)
    most = 0.025 * studies + 3 * (0.025 * 0.975 * studies) ** 0.5
    assert 0 < answers.count("holds") < most
    assert 0 < answers.count("does not hold") < most


def write_record(folder: Path, **changes: Any) -> None:
    """Write that a sweep until certain has trained the runs."""
    values = {"contenders": ("asgo", "adamw"), "against": None, "metric": "loss", "confidence": 0.95, "first_look": 3}
    Record(**{**values, "seeds": (1, 2, 3, 4, 5), **changes}).write(folder)


def test_seeds_that_were_added_until_certain_have_the_sequential_test(folder: Path) -> None:
    write_record(folder)
    found = judge_claim(claim_of(by=0.01), folder)
    limits = np.array(ADAMW) - 0.01
    spent = {3: (3 / 5) ** 3, 4: (4 / 5) ** 3 - (3 / 5) ** 3}
    expected = min(stats.ttest_rel(limits[:n], ASGO[:n]).pvalue / share for n, share in spent.items())
    assert (found.test, found.p) == ("sequential", pytest.approx(expected, rel=1e-6))


def test_a_diverged_run_decides_against_its_contender_only(folder: Path) -> None:
    run = write_run(folder / "asgo-s5", {0: 5.0}, optimizer="asgo", seed=5)
    record_divergence(run, 3, "the loss is inf")
    found = judge_claim(claim_of(), folder)
    assert (found.answer, found.reason) == ("does not hold", "a run of asgo diverged")
    turned = {"contender": "adamw", "better_than": "asgo"}
    found = judge_claim(claim_of(**turned), folder)
    assert (found.answer, found.reason) == ("cannot tell", "a run of asgo diverged")


def test_runs_that_differ_only_in_the_learning_rate_are_compared_by_name(tmp_path: Path) -> None:
    """`asgo compare` chooses one of them; a claim has named its own."""
    for name, lr, finals in (("low", 1e-3, ASGO), ("high", 1e-2, ADAMW)):
        for seed, final in enumerate(finals, start=1):
            write_run(tmp_path / f"{name}-s{seed}", falling_to(final), optimizer="adamw", seed=seed, optimizer__lr=lr)
    found = judge_claim(claim_of(contender="low", better_than="high"), tmp_path)
    assert (found.answer, found.test) == ("holds", "paired")


def test_one_seed_cannot_tell(folder: Path) -> None:
    for run in folder.glob("*-s[234]"):
        run.rename(folder.parent / run.name)
    found = judge_claim(claim_of(), folder)
    assert found.surplus is not None
    assert (found.answer, found.p, found.surplus.low) == ("cannot tell", None, None)
    assert found.reason is not None


@pytest.mark.parametrize("until_certain", [False, True])
@pytest.mark.parametrize("diverged", [None, "asgo", "adamw"])
def test_a_table_of_runs_says_the_same_as_the_runs(
    folder: Path, diverged: str | None, until_certain: bool, tmp_path: Path
) -> None:
    if until_certain:
        write_record(folder)
    if diverged is not None:
        record_divergence(write_run(folder / f"{diverged}-s5", {0: 5.0}, optimizer=diverged, seed=5), 3, "inf")
    write_report(compare_runs([folder]), tmp_path / "report", "asgo compare runs")
    table = claim_of(by=0.01).model_copy(update={"runs": (str(tmp_path / "report" / "tables" / "runs.csv"),)})
    assert replace(judge_claim(table, None), cautions=()) == replace(
        judge_claim(claim_of(by=0.01), folder), cautions=()
    )
    with pytest.raises(UsageError, match="sgd: no finished run has this name; choose from asgo, adamw"):
        judge_claim(table.model_copy(update={"statement": Statement(contender="sgd", better_than="asgo")}), None)


def test_a_table_of_two_folders_keeps_the_sequential_test(folder: Path, tmp_path: Path) -> None:
    """Which of its runs were added until certain is known only by the record."""
    write_record(folder)
    write_run(tmp_path / "other" / "sgd-momentum-s1", falling_to(4.0), optimizer="sgd-momentum", seed=1)
    for _ in range(2):  # the second report replaces the first
        write_report(compare_runs([folder, tmp_path / "other"]), tmp_path / "report", "asgo compare runs other")
    table = claim_of(contender="runs/asgo", better_than="runs/adamw", by=0.01)
    table = table.model_copy(update={"runs": (str(tmp_path / "report" / "tables" / "runs.csv"),)})
    found, expected = judge_claim(table, None), judge_claim(claim_of(by=0.01), folder)
    assert (found.test, found.p, found.cautions) == ("sequential", expected.p, ())
    mixed = {"contender": "runs/asgo", "better_than": "other/sgd-momentum"}
    found = judge_claim(table.model_copy(update={"statement": Statement(**mixed)}), None)
    assert found.cautions[0].startswith("Results decided how many seeds the contenders of runs got")


def test_a_table_saved_by_a_spreadsheet_is_read(folder: Path, tmp_path: Path) -> None:
    write_report(compare_runs([folder]), tmp_path / "report", "asgo compare runs")
    table = tmp_path / "report" / "tables" / "runs.csv"
    claim = claim_of(by=0.01).model_copy(update={"runs": (str(table),)})
    expected = judge_claim(claim, None)
    rows = list(csv.reader(table.read_text().splitlines()))
    cells = [[cell.replace(".", ",") if cell[:1].isdigit() else cell for cell in row] for row in rows]
    table.write_text("".join(";".join(row) + "\r\n" for row in cells), encoding="utf-8-sig")
    assert judge_claim(claim, None) == expected


def test_the_metric_of_a_table_is_the_one_it_compares(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    rows = [f"{name}-s{seed},{name},{seed},finished,{value + seed / 100}" for name, value in (("a", 0.8), ("b", 0.7))
            for seed in (1, 2, 3)]  # fmt: skip
    table.write_text("\n".join(["run,entry,seed,state,final_accuracy", *rows, ""]))
    claim = claim_of(contender="a", better_than="b").model_copy(update={"runs": (str(table),)})
    found = judge_claim(claim, None)
    assert (found.metric, found.reason) == (
        ACCURACY,
        "there is no test: it needs two seeds of each, and results that differ",
    )
    with pytest.raises(UsageError, match=r"compares by accuracy; for loss, give the runs, or a report by loss"):
        judge_claim(claim.model_copy(update={"metric": "loss"}), None)
    with pytest.raises(UsageError, match=r"statement\.by = 5: accuracy is a fraction from 0 to 1; 0\.05 is 5 points"):
        judge_claim(claim.model_copy(update={"statement": Statement(contender="a", better_than="b", by=5)}), None)


def test_a_contender_of_which_all_runs_diverged_is_judged_in_a_table_too(folder: Path, tmp_path: Path) -> None:
    for run in folder.glob("asgo-*"):
        record_divergence(RunFolder(run), 3, "inf")
    write_report(compare_runs([folder]), tmp_path / "report", "asgo compare runs")
    table = claim_of().model_copy(update={"runs": (str(tmp_path / "report" / "tables" / "runs.csv"),)})
    runs = claim_of().model_copy(update={"runs": (str(folder),)})
    for found in (judge_claim(table, None), judge_claim(runs, None), judge_claim(claim_of(), folder)):
        assert (found.answer, found.contender, found.reason) == ("does not hold", None, "a run of asgo diverged")


def test_what_makes_a_comparison_doubtful_is_said(folder: Path) -> None:
    write_run(folder / "asgo-s9", falling_to(3.0, 500), optimizer="asgo", seed=9, training__steps=500)
    found = judge_claim(claim_of(), folder)
    assert [caution for caution in found.cautions if caution.startswith("Different amounts of training")]


@pytest.mark.parametrize("as_table", [False, True])
def test_runs_are_checked_against_what_the_looks_have_seen(as_table: bool, folder: Path, tmp_path: Path) -> None:
    seen = {"asgo": dict(enumerate(ASGO, start=1)), "adamw": dict(enumerate(ADAMW, start=1))}
    write_record(folder, results=seen)
    claim = claim_of(by=0.01)
    if as_table:
        write_report(compare_runs([folder]), tmp_path / "report", "asgo compare runs")
        claim = claim.model_copy(update={"runs": (str(tmp_path / "report" / "tables" / "runs.csv"),)})
        folder = tmp_path / "report" / "tables"
    where = None if as_table else folder
    assert judge_claim(claim, where).test == "sequential"
    write_record(folder, results={**seen, "asgo": {**seen["asgo"], 2: 2.5}})
    with pytest.raises(AsgoError, match=r"asgo-s2: changed after a look at its result, which was 2\.5, see"):
        judge_claim(claim, where)
    write_record(folder, results={**seen, "asgo": {17: 2.0, **seen["asgo"]}}, seeds=(17, 1, 2, 3, 4))
    found = judge_claim(claim, where)
    assert (found.answer, found.test, found.reason) == ("cannot tell", None, "there is no test: asgo-s17 missing")
    assert [caution for caution in found.cautions if "has looked at are missing: asgo-s17;" in caution]


def test_runs_and_logs_are_named_as_in_a_comparison(folder: Path) -> None:
    found = judge_claim(claim_of(by=0.01).model_copy(update={"runs": (str(folder),)}), None)
    assert found == judge_claim(claim_of(by=0.01), folder)


@pytest.mark.parametrize(
    "content", ["run,entry,seed,state\na-s1,a,1,finished\n", "run,entry,seed,state,final_loss\na-s1,a,1,finished,x\n"]
)
def test_a_damaged_table_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(AsgoError, match="not a table of runs that asgo compare wrote"):
        judge_claim(claim_of().model_copy(update={"runs": (str(tmp_path / "runs.csv"),)}), None)


GOOD = {"sweep": "my.toml", "statement": {"contender": "a", "better_than": "b"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "runs": ["x"]}, "write either sweep or runs"),
        ({"statement": GOOD["statement"]}, "write either sweep or runs"),
        ({"sweep": "my.toml"}, "statement is missing"),
        ({**GOOD, "confidenze": 0.9}, "confidenze: unknown key"),
        ({**GOOD, "confidence": 2}, "confidence = 2: should be less than 1"),
        ({**GOOD, "max_seeds": 4}, "max_seeds is for until_certain = true"),
        ({**GOOD, "statement": {"contender": "a"}}, "statement: write either better_than or no_worse_than"),
        ({**GOOD, "statement": {"contender": "a", "better_than": "b", "by": "much"}}, "statement.by: 'much': write a"),
        ({**GOOD, "statement": {"contender": "a", "better_than": "b", "by": -1.0}}, "statement.by: -1.0: write a"),
        ({**GOOD, "statement": {"contender": "a", "better_than": "b", "by": math.nan}}, "statement.by: nan: write a"),
        ({**GOOD, "statement": {"contender": "a", "better_than": "b", "by": True}}, "statement.by: True: write a"),
        ({**GOOD, "statement": {"contender": "a", "better_than": "a"}}, "statement: a is compared with itself"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "claim.toml"
    path.write_text(tomli_w.dumps(values))
    with pytest.raises(UsageError) as error:
        read_claim(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_paths_begin_at_the_folder_of_the_claim(tmp_path: Path) -> None:
    path = tmp_path / "claim.toml"
    path.write_text(tomli_w.dumps(GOOD))
    assert read_claim(path).sweep == str(tmp_path / "my.toml")
    path.write_text(tomli_w.dumps({**GOOD, "sweep": "asro-gpt-paper"}))
    assert read_claim(path).sweep == "asro-gpt-paper"
    for content in ("a = ", "\ufeffa = [[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]"):
        path.write_text(content)
        with pytest.raises(UsageError, match="not valid TOML"):
            read_claim(path)
