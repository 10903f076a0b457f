"""Logs of other programs: what is read, what they do not say, and what is refused."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.analysis.comparison.compare import compare_runs
from pipelines.analysis.comparison.logs.run_names import split_name
from pipelines.analysis.comparison.report import summary, write_report
from pipelines.analysis.comparison.results import Comparison, Run
from pipelines.analysis.export import records, write_csv
from pipelines.errors import AsgoError, UsageError
from tests.pipelines.analysis.comparison.log_files import WRITERS, long_csv, losses_to, modded_nanogpt, nanochat, write
from tests.pipelines.analysis.comparison.run_folders import falling_to, write_run

FINALS = {"muon": (3.0, 3.01, 3.02), "adamw": (3.2, 3.21, 3.25)}


def write_all(folder: Path, kind: str = "long_csv") -> Path:
    """Two contenders with three seeds each."""
    for optimizer, finals in FINALS.items():
        for seed, final in enumerate(finals):
            WRITERS[kind](folder / f"{optimizer}-s{seed}", losses_to(final))
    return folder


def runs_of(comparison: Comparison) -> list[Run]:
    """All runs, the best contender first."""
    return [run for entry in comparison.entries for run in entry.runs]


def compare_text(folder: Path, text: str, name: str = "run.csv", **options: str) -> Run:
    """The only run of a file with this text."""
    (run,) = runs_of(compare_runs([write(folder / name, text)], **options))  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_contenders_the_seeds_and_the_losses(kind: str, tmp_path: Path) -> None:
    comparison = compare_runs([write_all(tmp_path, kind)])
    assert [entry.label for entry in comparison.entries] == ["muon", "adamw"]
    assert comparison.metric.name == ("bpb" if kind == "nanochat" else "loss")
    for run, final in zip(runs_of(comparison), (*FINALS["muon"], *FINALS["adamw"]), strict=True):
        assert (run.state, run.config, run.lr, run.last_step) == ("finished", None, None, 100)
        assert run.final == pytest.approx(final, abs=1e-6)
        assert run.val.steps.tolist() == [0, 50, 100]
        assert len(run.train.steps) == {"modded_nanogpt": 0, "nanochat": 0, "hugging_face": 20}.get(kind, 21)
        assert run.steps == (100 if kind in ("modded_nanogpt", "nanochat", "hugging_face") else None)
        assert np.isnan(run.val.tokens).all()
        assert np.isfinite(run.val.seconds).any() == (kind in ("modded_nanogpt", "nanochat"))
    assert [run.seed for run in runs_of(comparison)] == [0, 1, 2] * 2
    (verdict,) = comparison.verdicts
    assert (verdict.outcome, verdict.test) == ("better", "paired")


def test_an_export_gives_the_verdicts_of_its_runs(tmp_path: Path) -> None:
    for optimizer, finals in FINALS.items():
        for seed, final in enumerate(finals):
            path = tmp_path / "runs" / f"{optimizer}-s{seed}"
            write_run(path, falling_to(final), [4.0] * 160, optimizer=optimizer, seed=seed)
    with (tmp_path / "all.csv").open("w", encoding="utf-8", newline="") as file:
        write_csv(records(tmp_path / "runs").rows, file)
    own, exported = compare_runs([tmp_path / "runs"]), compare_runs([tmp_path / "all.csv"])
    assert own.verdicts == exported.verdicts
    for one, other in zip(own.entries, exported.entries, strict=True):
        assert (one.label, one.final, one.final_train, one.reach, one.step_ms) == (
            other.label, other.final, other.final_train, other.reach, other.step_ms
        )  # fmt: skip
    assert [run.name for run in runs_of(exported)][:2] == ["all.csv:muon-s0", "all.csv:muon-s1"]


@pytest.mark.parametrize(
    ("name", "contender", "seed"),
    [
        ("adamw-s1.csv", "adamw", 1),
        ("adamw_seed2.csv", "adamw", 2),
        ("adamw.seed=03.log", "adamw", 3),
        ("adamw/seed1/log.txt", "adamw", 1),
        ("muon-lr0.02-s1", "muon-lr0.02", 1),
        ("sgd/1.txt", "sgd", None),
        ("20260430_adamh/6b19a86b-ddfe-476c-9983-2a967bd99ca9.txt", "20260430_adamh", None),
        ("adamw/version_2/metrics.csv", "adamw", None),
        ("adams1.csv", "adams1", None),
        ("main.log", "", None),
    ],
)
def test_a_name_tells_the_contender_and_the_seed(name: str, contender: str, seed: int | None) -> None:
    assert split_name(name) == (contender, seed)


def test_without_seeds_a_test_is_not_paired_and_a_warning_says_so(tmp_path: Path) -> None:
    for optimizer, finals in FINALS.items():
        for number, final in enumerate(finals):
            name = f"6b19a86b-ddfe-476c-9983-2a967bd99ca{number}"
            modded_nanogpt(tmp_path / optimizer / name, losses_to(final))
    comparison = compare_runs([tmp_path / "muon", tmp_path / "adamw"], evidence_rule="track3")
    assert [entry.label for entry in comparison.entries] == ["muon", "adamw"]
    assert comparison.verdicts[0].test == "Welch"
    assert runs_of(comparison)[0].val.seconds.tolist() == pytest.approx([0, 7.5, 15])
    told = "\n".join(comparison.cautions)
    assert "No seed in the log or its name: muon/6b19a86b-ddfe-476c-9983-2a967bd99ca0.txt" in told
    assert "track3: muon: the log does not say data.order, model.context_length" in told
    assert [each.outcome for each in comparison.evidence] == ["met", "met"]
    assert "does not say how long" not in told


def test_one_unknown_seed_is_enough_not_to_pair(tmp_path: Path) -> None:
    for optimizer, finals in FINALS.items():
        long_csv(tmp_path / optimizer, losses_to(finals[0]))
        long_csv(tmp_path / f"{optimizer}-s1", losses_to(finals[1]))
        modded_nanogpt(tmp_path / f"{optimizer}-s2", losses_to(finals[2]))
    comparison = compare_runs([tmp_path], evidence_rule="track3")
    tests = {(each.first, each.second): each.test for each in comparison.verdicts}
    assert tests["muon steps=unknown", "adamw steps=unknown"] == "Welch"
    told = "\n".join(comparison.cautions)
    assert "the same settings have runs of 100 steps too" in told
    assert "the same settings have runs of unknown steps too" in told


def test_what_logs_do_not_say_is_a_warning_and_an_empty_cell(tmp_path: Path) -> None:
    comparison = compare_runs([write_all(tmp_path / "logs")])
    told = "\n".join(comparison.cautions)
    assert "which do not say model, data, validation, batch size and learning rate: muon-s0.csv, muon-s1.csv" in told
    assert "The log does not say how long the run is, so its last validation is the final one: muon-s0.csv" in told
    assert "Paired by seed, though logs do not say that runs of one seed share initialization and batches: muon" in told
    assert (comparison.task, summary(comparison)["task"]) == (None, None)
    page = write_report(comparison, tmp_path / "report", "asgo compare").read_text(encoding="utf-8")
    assert 'value="steps"' in page
    assert 'value="tokens"' not in page
    assert 'value="seconds"' not in page
    figures = sorted(path.name for path in (tmp_path / "report/figures").glob("*.png"))
    assert figures == ["differences.png", "final-losses.png", "loss-steps.png"]
    for name, empty in (
        ("entries", ("lr", "tokens_to_target", "seconds_to_target", "step_ms", "state_bytes")),
        ("runs", ("lr", "steps", "device", "tokens_to_target")),
        ("curves", ("tokens", "seconds")),
    ):
        with (tmp_path / f"report/tables/{name}.csv").open(encoding="utf-8") as file:
            assert {row[key] for row in csv.DictReader(file) for key in empty} == {""}


def test_a_run_and_a_log_are_on_one_page(tmp_path: Path) -> None:
    for seed, final in enumerate(FINALS["adamw"]):
        write_run(tmp_path / f"runs/adamw-s{seed}", falling_to(final), [4.0] * 160, seed=seed)
    comparison = compare_runs([tmp_path / "runs", write_all(tmp_path / "logs")])
    assert [entry.label for entry in comparison.entries] == ["muon", "adamw", "adamw (log)"]
    assert {(each.first, each.second): each.test for each in comparison.verdicts} == {
        ("muon", "adamw"): "Welch", ("muon", "adamw (log)"): "paired", ("adamw", "adamw (log)"): "Welch",
    }  # fmt: skip
    assert comparison.task == "gpt"
    page = write_report(comparison, tmp_path / "report", "asgo compare").read_text(encoding="utf-8")
    assert 'value="tokens"' in page
    assert (tmp_path / "report/figures/loss-tokens.png").exists()


def test_a_shorter_run_of_a_contender_is_not_finished(tmp_path: Path) -> None:
    write_all(tmp_path)
    long_csv(tmp_path / "muon-s0", {0: 6.0, 50: 4.5})
    comparison = compare_runs([tmp_path])
    cut = next(run for run in runs_of(comparison) if run.name == "muon-s0.csv")
    assert (cut.state, cut.final, cut.reason) == (
        "unfinished", None, "validates last at step 50, another run of muon at 100"
    )  # fmt: skip
    assert comparison.entries[0].final is not None
    assert comparison.entries[0].final.count == 2


def test_contenders_of_different_length_are_a_warning(tmp_path: Path) -> None:
    long_csv(tmp_path / "muon-s0", {0: 6.0, 50: 4.5})
    long_csv(tmp_path / "adamw-s0", losses_to(3.0))
    told = "\n".join(compare_runs([tmp_path]).cautions)
    assert "Different amounts of training: last validation at step 100 (adamw), last validation at step 50" in told


def test_a_log_that_says_its_length_is_unfinished_before_it(tmp_path: Path) -> None:
    modded_nanogpt(tmp_path / "muon-s1", {0: 6.0, 50: 4.5})
    (run,) = runs_of(compare_runs([tmp_path]))
    assert (run.state, run.reason, run.val.values.tolist()) == ("unfinished", "at step 50 of 100", [6.0, 4.5])


def test_bits_per_byte_do_not_mix_with_losses(tmp_path: Path) -> None:
    long_csv(tmp_path / "muon", losses_to(3.0))
    nanochat(tmp_path / "adamw", losses_to(1.0))
    with pytest.raises(UsageError, match=r"adamw\.log validates by bpb, .*muon\.csv by loss, which do not compare"):
        compare_runs([tmp_path])
    comparison = compare_runs([tmp_path], metric_name="loss")
    assert [run.name for run in runs_of(comparison)] == ["muon.csv"]
    assert any("adamw.log: no validation by loss; it validates by bpb" in caution for caution in comparison.cautions)


def test_a_chart_of_weights_and_biases_holds_several_runs(tmp_path: Path) -> None:
    names = [f"{optimizer}-s{seed} - val/loss" for optimizer in FINALS for seed in range(3)]
    heads = [f'"{name}{end}"' for name in names for end in ("", "__MIN", "__MAX")]
    lines = [",".join(['"Step"', *heads])]
    for step in (0, 50, 100):
        finals = [losses_to(final)[step] for values in FINALS.values() for final in values]
        lines.append(",".join([f'"{step}"', *(f'"{value}"' for final in finals for value in (final, 0.0, 9.0))]))
    comparison = compare_runs([write(tmp_path / "wandb_export.csv", "\n".join(lines))])
    assert [(run.optimizer, run.seed, run.final) for run in runs_of(comparison)] == [
        (optimizer, seed, final) for optimizer, finals in FINALS.items() for seed, final in enumerate(finals)
    ]


def test_columns_of_the_run_split_a_file(tmp_path: Path) -> None:
    rows = [
        f"{step},val,{loss},{optimizer},{seed}"
        for step in (0, 50, 100)
        for optimizer, finals in FINALS.items()
        for seed, final in enumerate(finals)
        for loss in [losses_to(final)[step]]
    ]
    path = write(tmp_path / "all.csv", "\n".join(["step,split,loss,optimizer,seed", *rows]))
    comparison = compare_runs([path])
    assert [(run.name, run.final) for run in runs_of(comparison)][::3] == [
        ("all.csv:muon-s0", 3.0),
        ("all.csv:adamw-s0", 3.2),
    ]


def test_columns_maps_names(tmp_path: Path) -> None:
    long = "iteration,phase,nll\n0,train,5\n0,test,5\n9,train,4\n9,test,4.5\n"
    assert compare_text(tmp_path, long, columns="split=phase,loss=nll").final == 4.5
    wide = "n;a;b\n0;5;5\n9;4;4.5\n"
    run = compare_text(tmp_path, wide, columns="step=n, val.loss=b, train.loss=a")
    assert (run.final, run.train.values.tolist()) == (4.5, [5, 4])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("step=x", r"^--columns step=x: .*run\.csv has no such column; it has n, a$"),
        ("stp=n", r"^--columns stp=n: give KEY=NAME, .*; did you mean step\?$"),
        ("step", r"^--columns step: give KEY=NAME, .*; the keys are step, split, loss"),
    ],
)
def test_a_wrong_option_is_one_line(columns: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        compare_text(tmp_path, "n,a\n0,5\n", columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: empty"),
        (
            "a.csv",
            b"\x00\xff\x9c" * 5000,
            "neither a CSV with a column of steps in its first line, nor a log of nanoGPT",
        ),
        ("a.txt", b"x" * 9_000_000, "neither a CSV"),
        ("a.csv", b"epoch,nll\n1,2\n", "its first line has epoch, nll"),
        ("a.csv", b"step,nll\n1,2\n", "no column of losses; name it: --columns val.loss=NAME,train.loss=NAME; it has"),
        ("a.csv", b"step,split,loss\n1,val,x\n2,val,1\n", "Row #2: CSV conversion error to double: invalid value 'x'"),
        ("a.csv", b"step,split,loss\n1,val\n2,val,1\n", "Row #2: Expected 3 columns, got 2"),
        ("a.csv", b"step,split,loss\n1,val,1\n1,val," + b"9" * 9_000_000, "a line is too long"),
        ("a.csv", b"step,split,loss\n-1,val,1\n", "step -1 is not a whole number from 0"),
        ("a.csv", b"step,split,loss\n0.5,val,1\n", "step 0.5 is not a whole number from 0"),
        ("a.csv", b"step,split,loss,tokens\n1,val,1,-7\n", "tokens is -7"),
        ("a.csv", b"step,split,loss\n1,b\x1b[31m,1\n", r"no train or val in the column of splits: b\x1b[31m"),
        (
            "a.csv",
            b"run,step,split,loss\n" + b"".join(b"%d,1,val,1\n" % n for n in range(10_001)),
            "more than 10,000 val",
        ),
        ("trainer_state.json", b'{"log_history": 7}', "not a state of Hugging Face's Trainer"),
        ("trainer_state.json", b'{"log_history":' + b"[" * 100_000, "not a state of Hugging Face's Trainer"),
        ("events.out.tfevents.1.host", b"\xff" * 5000, "events.out.tfevents.1.host: "),
    ],
)
def test_a_broken_log_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AsgoError) as error:
        compare_runs([tmp_path / name])
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_rows_that_are_odd_are_gaps_repeats_or_left_out(tmp_path: Path) -> None:
    text = "step,train_loss,val_loss\n0,5,5\n1,nan,\n2,4,4\n1,4.5,\n2,3,3.5\n,9,9\n3,2"
    run = compare_text(tmp_path, text)
    assert (run.train.values.tolist(), run.val.values.tolist()) == ([5, 4.5, 3], [5, 3.5])
    assert (run.lost_rows, run.repeated_rows) == (0, 3)
    assert compare_text(tmp_path, "step,train_loss,val_loss\n0,5,5\n1,inf,\n2,4,4\n").lost_rows == 1
    assert compare_text(tmp_path, "step,val_loss\n0,5\n1,4\n2,NaN\n").state == "diverged"
    padded = compare_text(tmp_path, "step,train_loss,val_loss\n0,nan,5\n1,4,nan\n2,3,3\n3,2,nan\n")
    assert (padded.state, padded.train.steps.tolist(), padded.val.steps.tolist()) == ("finished", [1, 2, 3], [0, 2])
    assert compare_text(tmp_path, "step,loss\n0,5\n1,4\n").reason == (
        "no validation in the log; --columns val.loss=NAME names its column"
    )


def test_a_log_in_utf_16_is_read_as_powershell_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("step 0: train loss 5.0, val loss 5.0\r\n", encoding="utf-16")
    assert runs_of(compare_runs([tmp_path / "a.log"]))[0].final == 5.0


def test_spaces_after_the_commas_are_not_part_of_names(tmp_path: Path) -> None:
    text = "step, split, loss, seed\n0, train, 4.0, 1\n0, val, 4.0, 1\n10, val, 3.0, 1\n"
    run = compare_text(tmp_path, text)
    assert (run.final, run.seed, len(run.train.steps)) == (3.0, 1, 1)
    named = compare_text(tmp_path, "it, nll\n0, 4.0\n10, 3.0\n", columns="step=it,val.loss=nll")
    assert named.final == 3.0


def test_logs_are_not_searched_where_runs_are_nor_in_folders_of_trackers(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/adamw", falling_to(3.0))
    long_csv(tmp_path / "runs/adamw-s1", losses_to(3.0))
    assert [run.name for run in runs_of(compare_runs([tmp_path / "runs"]))] == ["adamw"]
    long_csv(tmp_path / "logs/adamw", losses_to(3.0))
    long_csv(tmp_path / "logs/wandb/run-1/adamw", losses_to(3.0))
    long_csv(tmp_path / "logs/.cache/adamw", losses_to(3.0))
    write(tmp_path / "logs/notes.txt", "ideas")
    (tmp_path / "logs/again").symlink_to(tmp_path / "logs", target_is_directory=True)
    comparison = compare_runs([tmp_path / "logs"])
    assert [run.name for run in runs_of(comparison)] == ["adamw.csv"]
    assert comparison.cautions[0].startswith("notes.txt is left out: ")


def test_the_tables_of_a_report_are_not_logs(tmp_path: Path) -> None:
    long_csv(tmp_path / "logs/adamw", losses_to(3.0))
    write_report(compare_runs([tmp_path / "logs"]), tmp_path / "logs/report", "asgo compare")
    assert [run.name for run in runs_of(compare_runs([tmp_path / "logs"]))] == ["adamw.csv"]
    with pytest.raises(UsageError, match="neither a run nor a folder of runs, nor a log"):
        compare_runs([tmp_path / "logs/report"])


def test_without_tensorboard_the_error_says_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "events.out.tfevents.1.host", "")
    for name in [name for name in sys.modules if name.startswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(AsgoError, match=r"event files need tensorboard: pip install 'asgo\[tensorboard\]'"):
        compare_runs([tmp_path])
