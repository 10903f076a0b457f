"""What a run folder tells, also while it is being written, and when it is damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.find_runs import find_runs
from pipelines.analysis.comparison.read_runs import read_columns, read_run, read_runs
from pipelines.analysis.comparison.report import write_report
from pipelines.analysis.comparison.results import Run
from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.training.metrics import read_lines, rows_to_columns
from pipelines.training.run_folder import Divergence, RunFolder
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.analysis.comparison.run_folders import falling_to, record_divergence, write_run


def read(path: Path) -> Run:
    """The run in a folder."""
    return read_run("run", path)


@pytest.fixture
def trained(small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter) -> RunFolder:
    """A run of six steps that was really trained."""
    train(small_config(), tmp_path / "trained", reporter)
    return RunFolder(tmp_path / "trained")


def test_a_trained_run_is_read_as_it_was_recorded(trained: RunFolder) -> None:
    run, rows = read(trained.path), trained.rows()
    train_rows, val_rows = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    assert len(train_rows) == 6
    assert len(val_rows) == 3
    for curve, expected in ((run.train, train_rows), (run.val, val_rows)):
        assert curve.steps.tolist() == [row["step"] for row in expected]
        assert curve.tokens.tolist() == [row["tokens"] for row in expected]
        assert curve.seconds.tolist() == [row["elapsed_s"] for row in expected]
        assert curve.values.tolist() == [row["loss"] for row in expected]
    assert (run.state, run.reason, run.last_step, run.is_trial) == ("finished", None, 6, False)
    assert run.final == val_rows[-1]["loss"]
    assert run.best == min(row["loss"] for row in val_rows)
    assert run.step_ms == np.median([row["step_ms"] for row in train_rows])
    assert run.optimizer_ms == np.median([row["optimizer_ms"] for row in train_rows])
    assert run.config == trained.config()
    assert len(run.data["fingerprint"]) == 64
    assert "torch" in run.environment
    assert run.beside is None


def test_state_bytes_are_those_of_the_newest_checkpoint(trained: RunFolder) -> None:
    newest = sorted(trained.checkpoints.glob("step-*"))[-1] / "optimizer.safetensors"
    expected = sum(tensor.nbytes for tensor in safetensors.numpy.load_file(newest).values())
    assert read(trained.path).state_bytes == expected > 0
    content = newest.read_bytes()
    for damaged in (content[:-1], content[:50], b"", b"\xff" * 100, content[:8] + b"[]" + content[10:]):
        newest.write_bytes(damaged)
        assert read(trained.path).state_bytes is None


def test_the_fast_reader_gives_what_the_exact_one_does(trained: RunFolder) -> None:
    expected = rows_to_columns(trained.rows())
    for name, column in read_columns(trained.metrics_path).items():
        np.testing.assert_array_equal(column, expected[name], err_msg=name)


def test_runs_on_images_are_read_by_accuracy_with_the_loss_beside(tmp_path: Path) -> None:
    accuracy = {0: 0.1, 2: 0.7, 4: 0.6}
    write_run(tmp_path, {0: 7.0, 2: 5.5, 4: 6.0}, [6.5] * 4, task="images", training__steps=4, accuracy=accuracy)
    run = read(tmp_path)
    assert run.val.values.tolist() == [0.1, 0.7, 0.6]
    assert run.train.values.tolist() == [0.1, 0.7, 0.7, 0.6]
    assert (run.state, run.final, run.best, run.beside) == ("finished", 0.6, 0.7, 6.0)
    run = read_run("images", tmp_path, "loss")
    assert run.val.values.tolist() == [7.0, 5.5, 6.0]
    assert (run.final, run.best, run.beside) == (6.0, 5.5, 0.6)


def test_a_run_without_accuracies_is_left_out_with_the_way_to_compare_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {0: 7.0, 4: 6.0}, task="images", training__steps=4)
    folder.metrics_path.write_text(folder.metrics_path.read_text().replace(', "accuracy": 0.25', "", 1))
    with pytest.raises(AsgoError, match=r"metrics.jsonl: a validation without accuracy; --metric loss compares the"):
        read(tmp_path)
    assert read_run("images", tmp_path, "loss").final == 6.0


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {0: 5.0, 160: 3.0}, [4.0] * 160)
    whole = folder.metrics_path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in (1, 2, last - 1, last):
        folder.metrics_path.write_bytes(whole[:-cut])
        run = read(tmp_path)
        assert (run.state, run.reason) == ("unfinished", "at step 160 of 160")
        assert run.val.values.tolist() == [5.0]
    folder.metrics_path.write_bytes(whole[:20])
    assert read(tmp_path).state == "empty"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b'{"step": 1, "tok\n', r"metrics\.jsonl:2: not a line of metrics"),
        (b"\x00\xff\n", "metrics"),
        (b'{"step": 1, "tokens": 1, "samples": 1, "split": "train"}\n', "not the metrics of a run"),
        (
            b'{"step": 1, "tokens": 1, "samples": 1, "split": "test", "loss": 1.0, "elapsed_s": 1.0}\n',
            "not the metrics",
        ),
    ],
)
def test_a_damaged_run_is_left_out_and_named(tmp_path: Path, damage: bytes, words: str) -> None:
    write_run(tmp_path / "good", falling_to(3.0))
    bad = write_run(tmp_path / "bad", falling_to(3.0)).metrics_path
    first, *rest = bad.read_bytes().splitlines(keepends=True)
    bad.write_bytes(first + damage + b"".join(rest))
    runs, left_out = read_runs(find_runs([tmp_path]))
    assert [run.name for run in runs] == ["good"]
    assert len(left_out) == 1
    assert left_out[0].startswith("bad is left out: ")
    with pytest.raises(AsgoError, match=words):
        read_run("bad", tmp_path / "bad")
    with pytest.raises(AsgoError, match="bad is left out"):
        compare_runs([tmp_path / "bad"])


def test_a_configuration_of_another_version_is_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", falling_to(3.0))
    path = write_run(tmp_path / "old", falling_to(3.0)).config_path
    record = json.loads(path.read_text())
    record["config"]["optimizer"]["warp"] = 9
    path.write_text(json.dumps(record))
    comparison = compare_runs([tmp_path])
    assert [run.name for entry in comparison.entries for run in entry.runs] == ["good"]
    assert comparison.cautions[0].startswith("old is left out: ")
    assert "not a configuration that this version of asgo can read" in comparison.cautions[0]


def test_a_run_that_cannot_be_opened_is_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", falling_to(3.0))
    found = find_runs([tmp_path]) | {"gone": tmp_path / "gone"}
    _, left_out = read_runs(found)
    assert left_out == [f"gone is left out: {tmp_path / 'gone' / 'config.json'}: No such file or directory."]


def test_states_and_their_reasons(tmp_path: Path) -> None:
    def state(name: str, val: dict[int, float], train: list[float], divergence: Divergence | None = None) -> object:
        folder = write_run(tmp_path / name, val, train, training__steps=2000)
        if divergence is not None:
            record_divergence(folder, divergence.step, divergence.reason)
        run = read(folder.path)
        assert (run.final is None) == (run.state != "finished")
        return run.state, run.reason

    assert state("a", {0: 5.0, 2000: 4.9}, []) == ("finished", None)
    assert state("b", {0: 5.0, 1000: 3.0}, [4.0] * 1234) == ("unfinished", "at step 1,234 of 2,000")
    assert state("c", {0: 5.0}, [4.0] * 1234) == ("unfinished", "at step 1,234 of 2,000")
    assert state("d", {}, []) == ("empty", "nothing recorded yet")
    nan = Divergence(1234, "the loss is nan")
    assert state("e", {0: 5.0}, [4.0] * 1233, nan) == (
        "diverged",
        "a loss or gradient that is not finite at step 1,234",
    )
    assert state("f", {}, [], nan)[0] == "diverged"  # type: ignore[index]
    risen = "validation loss 5 at step 1,000, untrained 5"
    assert state("g", {0: 5.0, 500: 4.0, 1000: 5.0}, []) == ("diverged", risen)
    assert state("h", {0: 5.0, 2000: 7.0}, [])[0] == "diverged"  # type: ignore[index]
    assert state("i", {0: 5.0, 999: 7.0}, [])[0] == "unfinished"  # type: ignore[index]
    for index, val in enumerate(({1000: 4.0, 2000: math.nan}, {1000: 4.0, 2000: math.inf}, {1000: math.nan})):
        reason = f"a validation loss that is not finite at step {max(val):,}"
        assert state(f"j{index}", val, []) == ("diverged", reason)


def test_a_long_run_is_thinned_and_its_medians_are_of_all_of_it(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(4.0, 0.1, 20_000)
    losses[12_345] = 9.0
    folder = write_run(tmp_path, {0: 5.0, 20_000: 3.0}, losses.tolist(), training__steps=20_000)
    run = read_run("run", tmp_path)
    shown = run.train
    assert len(shown.steps) <= 2000
    assert (shown.steps[0], shown.steps[-1], shown.values.max()) == (1, 20_000, 9.0)
    assert shown.values.tolist() == losses[shown.steps.astype(int) - 1].tolist()
    assert run.step_ms == np.median([row["step_ms"] for row in read_lines(folder.metrics_path) if "lr" in row])
    smoothed = run.smoothed
    assert len(smoothed.steps) <= 1000
    for step, loss in list(zip(smoothed.steps.astype(int), smoothed.values, strict=True))[::97]:
        reach = min(step - 1, 400)  # 4 % of the run, half on each side
        assert loss == pytest.approx(losses[step - 1 - reach : step + reach].mean())


def test_runs_are_found_once_and_named_below_what_they_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/one", "a/deep/two", "b/three"):
        write_run(tmp_path / name, {})
    exported = tmp_path / "a" / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    paths = [Path("a"), Path("a/one"), tmp_path / "a", Path("b/three"), Path("a/../b")]
    assert sorted(find_runs(paths)) == ["a/deep/two", "a/one", "b/three"]
    assert find_runs([Path("a/one")]) == {"one": Path("a/one")}
    (tmp_path / "link").symlink_to(tmp_path / "b" / "three")
    assert list(find_runs([Path("link"), Path("b")])) == ["three"]


def test_a_path_without_runs_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {})
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="none: neither a run nor a folder of runs"):
        find_runs([tmp_path / "run", tmp_path / "none"])
    with pytest.raises(UsageError, match="missing: no such folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(UsageError, match=r"config\.json: this is a file"):
        find_runs([tmp_path / "run" / "config.json"])


def test_trials_are_runs_in_the_folder_of_a_search(tmp_path: Path) -> None:
    trial = write_run(tmp_path / "out" / "trials" / "asgo-t0", {}).path
    assert not read(trial).is_trial
    (trial.parent / "search.json").write_text("{}")
    assert read(trial).is_trial
    assert not read(write_run(tmp_path / "out" / "asgo-s1", {}).path).is_trial


def test_a_loss_that_is_not_finite_is_a_gap_and_named(tmp_path: Path) -> None:
    for name, lost in (("whole", 4.0), ("gap", float("inf"))):
        write_run(tmp_path / name, falling_to(3.0), [4.0] * 100 + [lost] + [4.0] * 59, seed=len(name))
    run = read(tmp_path / "gap")
    assert (run.state, run.final, run.lost_rows) == ("finished", 3.0, 1)
    assert 101 not in run.train.steps
    assert np.isfinite(run.smoothed.values).all()
    assert "Losses that are not finite, shown as gaps in the curves: gap." in compare_runs([tmp_path]).cautions


def test_of_a_step_that_was_recorded_twice_the_last_record_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "again", falling_to(3.0), [4.0] * 160)
    lines = folder.metrics_path.read_bytes().splitlines(keepends=True)
    behind = [line.replace(b'"loss": 4.0', b'"loss": 9.0') for line in lines[100:150]]
    folder.metrics_path.write_bytes(b"".join([*lines[:120], *behind, *lines[100:]]))
    run = read(folder.path)
    assert run.train.steps.tolist() == list(range(1, 161))
    assert set(run.train.values.tolist()) == {4.0}
    assert run.repeated_rows == 20 + 50
    assert compare_runs([tmp_path]).cautions[0].startswith("Steps recorded more than once")


def test_linked_runs_take_part_and_loops_end(tmp_path: Path) -> None:
    write_run(tmp_path / "scratch/far", falling_to(3.0))
    write_run(tmp_path / "runs/near", falling_to(3.1))
    (tmp_path / "runs/linked").symlink_to(tmp_path / "scratch/far")
    (tmp_path / "runs/again").symlink_to(tmp_path / "scratch/far")  # the same run once more
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/nowhere").symlink_to(tmp_path / "gone")
    found = find_runs([tmp_path / "runs"])
    assert list(found) == ["again", "near", "nowhere"]
    runs, left_out = read_runs(found)
    assert [run.name for run in runs] == ["again", "near"]
    assert len(left_out) == 1
    assert left_out[0].startswith("nowhere is left out: ")


def test_many_runs_that_cannot_be_read_are_told_in_few_lines(tmp_path: Path) -> None:
    write_run(tmp_path / "good", falling_to(3.0))
    found = find_runs([tmp_path]) | {f"gone{number}": tmp_path / f"gone{number}" for number in range(40)}
    _, left_out = read_runs(found)
    assert len(left_out) == 5
    assert left_out[-1].startswith("36 more unreadable runs")


def test_nesting_too_deep_is_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "deep", falling_to(3.0))
    folder.metrics_path.write_text("[" * 100_000 + "\n")
    with pytest.raises(AsgoError, match="not a line of metrics"):
        read(folder.path)
    folder.config_path.write_text('{"config": ' + "[" * 100_000)
    with pytest.raises(AsgoError, match="not a configuration"):
        read(folder.path)


def test_control_characters_of_a_stranger_are_shown_by_their_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a\x1b]0;T\x07", falling_to(3.0), device="cpu\x1b[31m")
    write_run(tmp_path / "runs/b", falling_to(3.1), optimizer="asgo")
    comparison = compare_runs([tmp_path / "runs"])
    write_report(comparison, tmp_path / "report", "asgo compare runs")
    for path in (tmp_path / "report").rglob("*.[hmc][tds][mv]*"):
        assert not set(path.read_text(encoding="utf-8")) & {"\x1b", "\x07"}
    assert r"a\x1b]0;T\x07" in {run.name for entry in comparison.entries for run in entry.runs}
