"""`asgo compare` on runs whose seeds a sweep added until certain: the sequential test, and what is said of others."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.report import write_report
from pipelines.analysis.comparison.rules import RULES
from pipelines.analysis.comparison.until_certain import RECORD, Record
from pipelines.errors import AsgoError
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

ASGO = [3.00, 3.02, 3.01, 3.015, 3.00]
ADAMW = [3.05, 3.06, 3.08, 3.05, 3.07]
TERMS: dict[str, Any] = {key.replace(".", "__"): value for key, value in RULES["track3"].settings.items()}


def write_runs(folder: Path, optimizer: str, finals: list[float], **settings: Any) -> None:
    for seed, final in enumerate(finals, start=1):
        write_run(folder / f"{optimizer}-s{seed}", falling_to(final), optimizer=optimizer, seed=seed, **settings)


def write_record(folder: Path, **changes: Any) -> None:
    values = {"contenders": ("asgo", "adamw"), "against": None, "metric": "loss", "confidence": 0.95, "first_look": 3}
    Record(**{**values, "seeds": (1, 2, 3, 4, 5, 6), **changes}).write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two contenders with five of six seeds."""
    write_runs(tmp_path / "mine", "asgo", ASGO)
    write_runs(tmp_path / "mine", "adamw", ADAMW)
    write_record(tmp_path / "mine")
    return tmp_path / "mine"


def expected_p() -> float:
    spent = {2: 0.0, **{count: (count / 6) ** 3 for count in (3, 4, 5)}}
    ps = {count: stats.ttest_rel(ASGO[:count], ADAMW[:count]).pvalue for count in (3, 4, 5)}
    return min(p / (spent[count] - spent[count - 1]) for count, p in ps.items())


def test_the_test_is_the_sequential_one_at_any_confidence(folder: Path) -> None:
    (verdict,) = compare_runs([folder]).verdicts
    assert (verdict.test, verdict.outcome, verdict.seeds_needed) == ("sequential", "better", None)
    assert verdict.p == pytest.approx(expected_p(), rel=1e-9)
    (strict,) = compare_runs([folder], confidence=0.999).verdicts
    assert (strict.p, strict.outcome, strict.seeds_needed) == (verdict.p, "cannot tell", None)
    for each in (verdict, strict):
        assert each.corrected is not None
        assert (each.corrected[1] < 0) == (each.outcome == "better")
    (folder / RECORD).unlink()
    (plain,) = compare_runs([folder]).verdicts
    assert (plain.test, plain.p) == ("paired", pytest.approx(stats.ttest_rel(ASGO, ADAMW).pvalue, rel=1e-9))
    assert plain.p < verdict.p


def test_the_page_and_the_rule_say_so(folder: Path, tmp_path: Path) -> None:
    comparison = compare_runs([folder])
    page = html.unescape(write_report(comparison, tmp_path / "report", "asgo compare").read_text())
    sentence = "have a sequential test instead: paired t-tests after 3 to 6 seeds"
    assert sentence in comparison.rule
    assert sentence in page
    assert "sequential" in (tmp_path / "report/tables/verdicts.md").read_text()
    (folder / RECORD).unlink()
    assert "sequential" not in compare_runs([folder]).rule


def test_runs_given_one_by_one_or_through_links_are_recognized(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for run in folder.glob("*-s*"):
        (tmp_path / "links" / f"run-{run.name}").symlink_to(run)
    for paths in (sorted(folder.glob("*-s*")), [tmp_path / "links"]):
        (verdict,) = compare_runs(paths).verdicts
        assert (verdict.test, verdict.p) == ("sequential", pytest.approx(expected_p(), rel=1e-9))


@pytest.mark.parametrize("place", ["other", "mine"])
def test_a_contender_without_a_record_has_the_usual_test_and_a_warning(
    place: str, folder: Path, tmp_path: Path
) -> None:
    if place == "other":
        assert not [caution for caution in compare_runs([folder]).cautions if caution.startswith("Results decided")]
    write_runs(tmp_path / place, "muon", [3.04, 3.01, 3.03, 3.05, 3.06])
    comparison = compare_runs([tmp_path])
    tests = {frozenset((each.first, each.second)): each.test for each in comparison.verdicts}
    assert tests == {
        frozenset(("asgo", "adamw")): "sequential",
        frozenset(("asgo", "muon")): "paired",
        frozenset(("adamw", "muon")): "paired",
    }
    warning = "Results decided how many seeds the contenders of mine got: tests of one of them and a contender"
    assert [caution for caution in comparison.cautions if caution.startswith(warning)]


def test_other_seeds_of_a_contender_are_left_out_of_its_test_with_a_warning(folder: Path) -> None:
    write_run(folder / "asgo-s17", falling_to(2.0), optimizer="asgo", seed=17)
    comparison = compare_runs([folder])
    (verdict,) = comparison.verdicts
    assert verdict.p == pytest.approx(expected_p(), rel=1e-9)
    (warning,) = [caution for caution in comparison.cautions if "sequential" in caution]
    assert warning.startswith("More runs than those of a sweep until certain: asgo;")


def test_a_run_in_progress_leaves_the_looks_before_it(folder: Path) -> None:
    write_run(folder / "asgo-s6", {0: 5.0, 80: 4.0}, optimizer="asgo", seed=6)
    write_run(folder / "adamw-s6", falling_to(3.06), optimizer="adamw", seed=6)
    (verdict,) = compare_runs([folder]).verdicts
    assert verdict.p == pytest.approx(expected_p(), rel=1e-9)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"seeds": [1, 1, 2]}', "[" * 100_000, pytest.param(None, id="too few seeds")],
)
def test_a_damaged_record_is_an_error_and_not_the_usual_test(text: str | None, folder: Path) -> None:
    record = (folder / RECORD).read_text()
    broken = record.replace('"first_look": 3', '"first_look": 7') if text is None else text
    (folder / RECORD).write_text(broken)
    with pytest.raises(AsgoError, match=r"until-certain\.json: damaged; without it, the runs of this sweep cannot be"):
        compare_runs([folder])


def test_an_evidence_rule_does_not_accept_them(tmp_path: Path) -> None:
    for name, finals in (("asgo", [3.2, 3.21, 3.2]), ("adamw", [3.25, 3.24, 3.26])):
        write_runs(tmp_path, name, finals, **TERMS)
    assert [each.outcome for each in compare_runs([tmp_path], evidence_rule="track3").evidence] == ["met"] * 2
    write_record(tmp_path)
    comparison = compare_runs([tmp_path], evidence_rule="track3")
    assert [each.objections for each in comparison.evidence] == [("results decided how many seeds it has",)] * 2
