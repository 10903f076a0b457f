"""A branch begins at a checkpoint of another run; with nothing changed, it is that run, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from optim import OPTIMIZER_NAMES
from pipelines.config import GPTRunConfig, RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import sha256_of
from pipelines.training.checkpoint import newest_checkpoint
from pipelines.training.lineage import Ancestor, BranchPoint
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests import forks
from tests.conftest import SilentReporter
from tests.long import sampled
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_kills import wait_for_records
from tests.pipelines.training.test_resume import assert_same_run, without_times

Make = Callable[..., RunConfig]


def tensors_of(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def lr_by_step(run: Path) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in RunFolder(run).rows() if row["split"] == "train"}


@pytest.mark.parametrize("name", sampled(OPTIMIZER_NAMES, "asgo", "accasro", "adamw"))
def test_a_branch_with_nothing_changed_equals_its_parent(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """With dropout, accumulation and a moving average, from a middle step; then a branch of the branch."""
    config = small_config(
        optimizer__name=name, model__dropout=0.2, training__micro_batch_size=2, training__ema_decay=0.9,
        checkpoint__keep=9, metrics__every=1, evaluation__every=2,
    )  # fmt: skip
    train(config, tmp_path / "trunk", reporter)
    train(config, tmp_path / "one", reporter, branch=BranchPoint(tmp_path / "trunk", 2))
    assert_same_run(tmp_path / "trunk", tmp_path / "one")
    assert_equal(tensors_of(tmp_path / "trunk", 6, "average"), tensors_of(tmp_path / "one", 6, "average"))
    shutil.rmtree(tmp_path / "trunk")
    train(config, tmp_path / "two", reporter, branch=BranchPoint(tmp_path / "one", 4))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert [str(each) for each in RunFolder(tmp_path / "two").lineage()] == [
        f"{tmp_path / 'trunk'}@2",
        f"{tmp_path / 'one'}@4",
    ]


def test_the_lineage_names_the_checkpoint(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    config = small_config()
    train(config, tmp_path / "trunk", reporter)
    parent = tmp_path / "trunk" / "checkpoints" / "step-00000004"
    train(config, tmp_path / "branch", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    digest = sha256_of(parent / "state.json")
    expected = Ancestor(run=str(tmp_path / "trunk"), step=4, sha256=digest, optimizer=config.optimizer.name)
    assert RunFolder(tmp_path / "branch").lineage() == [expected]
    assert RunFolder(tmp_path / "branch").config() == config
    assert "lineage" not in json.loads((tmp_path / "trunk" / "config.json").read_text())
    assert reporter.notes[-1] == f"branching from {parent}"


def test_without_a_step_a_branch_begins_at_the_newest_checkpoint(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """A longer training: the schedule is that of the longer run from there on."""
    train(small_config(schedule__kind="constant"), tmp_path / "trunk", reporter)
    longer = small_config(training__steps=9, schedule__kind="linear", metrics__every=1)
    rows = train(longer, tmp_path / "longer", reporter, branch=BranchPoint(tmp_path / "trunk"))
    before = RunFolder(tmp_path / "trunk").rows()
    assert rows[: len(before)] == before, "with the parent's times"
    assert [row["step"] for row in rows if row["split"] == "train"][-3:] == [7, 8, 9]
    assert rows[-1]["step"] == 9
    assert rows[-1]["elapsed_s"] > before[-1]["elapsed_s"]
    checkpoint, _ = newest_checkpoint(tmp_path / "longer" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.rows() == rows, "a checkpoint alone is enough for export-metrics"


def test_a_branch_may_change_the_optimizers_settings_and_keep_its_state(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(optimizer__name="adamw"), tmp_path / "trunk", reporter)
    changed = small_config(optimizer__name="adamw", optimizer__lr=0.5, optimizer__no_decay=["embeddings"])
    train(changed, tmp_path / "branch", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    for name in ("model", "optimizer", "rng-0"):
        assert_equal(tensors_of(tmp_path / "trunk", 4, name), tensors_of(tmp_path / "branch", 4, name))
    rates = lr_by_step(tmp_path / "branch")
    assert rates[6] == pytest.approx(500 * lr_by_step(tmp_path / "trunk")[6])
    assert not [note for note in reporter.notes if "new state" in note]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"optimizer__name": "asgo"}, {"optimizer__name": "adamw"}, "adamw begins at step 4 with a new state"),
        ({"optimizer__name": "muon"}, {"optimizer__name": "muon", "optimizer__by_heads": True}, "other settings"),
        ({}, {"seed": 7}, "data order and random numbers are those of seed 7"),
        ({}, {"seed": 7, "data__order": "sequential"}, "from step 4 on, random numbers are those of seed 7"),
        ({"data__order": "sequential"}, {}, "from step 4 on, the order of the data is shuffled"),
        ({}, {"training__ema_decay": 0.5}, "the moving average begins with the weights of step 4"),
        ({"training__ema_decay": 0.5}, {}, "branching from"),
        ({}, {"training__precision": "fp16"}, "branching from"),
        ({"training__precision": "fp16"}, {}, "branching from"),
    ],
)
def test_what_a_branch_does_not_take_over_is_said(
    before: dict[str, Any], after: dict[str, Any], words: str, small_config: Make, tmp_path: Path
) -> None:
    """And the branch resumes from its first checkpoint, and ends as if it had not been stopped."""
    reporter = SilentReporter()
    train(small_config(**before), tmp_path / "trunk", SilentReporter())
    config, point = small_config(**after, checkpoint__keep=9, metrics__every=1), BranchPoint(tmp_path / "trunk", 4)
    rows = train(config, tmp_path / "branch", reporter, branch=point)
    assert [note for note in reporter.notes if words in note]
    assert_equal(tensors_of(tmp_path / "trunk", 4, "model"), tensors_of(tmp_path / "branch", 4, "model"))
    shutil.copytree(tmp_path / "branch", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    again = train(config, tmp_path / "resumed", reporter, resume=True)
    assert_same_run(tmp_path / "branch", tmp_path / "resumed")
    assert without_times(again) == without_times(rows)


def test_another_seed_and_a_new_average_begin_at_the_step(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(), tmp_path / "trunk", reporter)
    config = small_config(seed=7, training__ema_decay=0.5, checkpoint__keep=9)
    train(config, tmp_path / "branch", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    assert_equal(tensors_of(tmp_path / "trunk", 4, "model"), tensors_of(tmp_path / "branch", 4, "average"))
    before, after = (tensors_of(tmp_path / run, 4, "rng-0")["cpu"] for run in ("trunk", "branch"))
    assert not torch.equal(before, after)


def test_another_data_folder_is_said(
    small_config: Make, token_folder: Path, tmp_path: Path, reporter: SilentReporter
) -> None:
    from pipelines.data.text_to_shards import prepare_text

    config = small_config()
    train(config, tmp_path / "trunk", reporter)
    text = (token_folder.parent / "text.txt").read_text()
    (tmp_path / "other.txt").write_text(text[: len(text) // 2])
    prepare_text([tmp_path / "other.txt"], tmp_path / "other", tokenizer="chars", val_fraction=0.1)
    shutil.copytree(token_folder, tmp_path / "copy")
    point = BranchPoint(tmp_path / "trunk", 4)
    other, copy = (small_config(data__folder=str(tmp_path / name)) for name in ("other", "copy"))
    train(copy, tmp_path / "same", reporter, branch=point)
    assert_same_run(tmp_path / "trunk", tmp_path / "same")
    assert not [note for note in reporter.notes if "the data is" in note]
    train(other, tmp_path / "branch", reporter, branch=point)
    assert f"from step 4 on, the data is {tmp_path / 'other'}" in reporter.notes[-1]


@pytest.mark.parametrize(
    ("changes", "step", "words"),
    [
        ({}, 3, "no such checkpoint; the run has those of steps 4, 6"),
        ({}, None, "the branch begins at step 6, so training.steps=6 leaves nothing to train"),
        ({"training__steps": 2}, 4, "the branch begins at step 4, so training.steps=2"),
        ({"training__batch_size": 8}, 4, "cannot change this: training.batch_size is 4 in the run, 8 now"),
        ({"model__n_layers": 2}, 4, "cannot change this: model.n_layers is 1 in the run, 2 now"),
    ],
)
def test_an_impossible_branch_is_one_line_and_leaves_nothing(
    changes: dict[str, Any], step: int | None, words: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(), tmp_path / "trunk", reporter)
    with pytest.raises(UsageError) as error:
        train(small_config(**changes), tmp_path / "new", reporter, branch=BranchPoint(tmp_path / "trunk", step))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_branch_of_what_is_no_run_or_is_damaged_is_one_line(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config()
    with pytest.raises(UsageError, match=r"trunk holds no run$"):
        train(config, tmp_path / "new", reporter, branch=BranchPoint(tmp_path / "trunk"))
    train(config, tmp_path / "trunk", reporter)
    with pytest.raises(UsageError, match="already holds a run"):
        train(config, tmp_path / "trunk", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    with pytest.raises(UsageError, match=r"holds a run that is not a branch, not from .*trunk@4; choose another --out"):
        train(config, tmp_path / "trunk", reporter, resume=True, branch=BranchPoint(tmp_path / "trunk", 4))
    (tmp_path / "trunk" / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"")
    with pytest.raises(AsgoError, match="truncated"):
        train(config, tmp_path / "new", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    assert not (tmp_path / "new").exists()


def branch_in_a_process(config: str, out: Path, parent: Path) -> None:
    """The command that a Slurm script repeats."""
    point = BranchPoint(parent, 4)
    train(GPTRunConfig.model_validate_json(config), out, SilentReporter(), resume=True, branch=point)


def test_a_killed_branch_resumes_exactly_without_its_parent(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """By SIGKILL, and with the same command."""
    train(small_config(optimizer__name="asgo"), tmp_path / "trunk", reporter)
    config = small_config(
        optimizer__name="accasro", training__steps=200, checkpoint__every=10, metrics__every=1, model__dropout=0.1
    )
    train(config, tmp_path / "whole", reporter, branch=BranchPoint(tmp_path / "trunk", 4))
    arguments = (config.model_dump_json(), tmp_path / "killed", tmp_path / "trunk")
    process = forks.start(branch_in_a_process, *arguments)
    wait_for_records(process, tmp_path / "killed", 25)
    process.kill()
    process.join()
    reached, _ = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert reached is not None
    assert reached.step < 200
    shutil.rmtree(tmp_path / "trunk")
    branch_in_a_process(*arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 200)


def test_a_branch_that_died_before_its_first_checkpoint_begins_again_there(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at step 0; without its parent it is an error."""
    from pipelines.training import train as training

    config, point = small_config(checkpoint__every=3, checkpoint__keep=9), BranchPoint(tmp_path / "trunk", 4)
    train(small_config(), tmp_path / "trunk", reporter)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "branch", reporter, branch=point)
    assert RunFolder(tmp_path / "branch").exists()
    (tmp_path / "trunk").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="trunk holds no run"):
        train(config, tmp_path / "branch", reporter, resume=True)
    (tmp_path / "moved").rename(tmp_path / "trunk")
    train(config, tmp_path / "branch", reporter, resume=True)
    assert_same_run(tmp_path / "trunk", tmp_path / "branch")
    names = sorted(path.name for path in (tmp_path / "branch" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]


def test_a_parent_that_changed_before_the_branch_could_begin_again_is_refused(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training import train as training

    config, point = small_config(), BranchPoint(tmp_path / "trunk", 4)
    train(config, tmp_path / "trunk", reporter)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "branch", reporter, branch=point)
    shutil.rmtree(tmp_path / "trunk")
    train(small_config(training__max_grad_norm=0.1), tmp_path / "trunk", reporter)
    with pytest.raises(AsgoError, match="trunk@4 has changed since this branch began; choose another --out"):
        train(config, tmp_path / "branch", reporter, resume=True)


@pytest.mark.parametrize("shape", [{}, {"runtime__shard_optimizer": True}, {"runtime__shard_model": True}])
def test_two_processes_branch_as_they_resume(shape: dict[str, Any], small_config: Make, tmp_path: Path) -> None:
    """With nothing changed; and with another optimizer, whose first checkpoint has no state yet."""
    config = small_config(optimizer__name="asgo", model__dropout=0.2, training__ema_decay=0.5, **shape)
    other = small_config(optimizer__name="muon", model__dropout=0.2, **shape)
    point = BranchPoint(tmp_path / "trunk", 4)
    jobs = [
        Job(config, tmp_path / "trunk"),
        Job(config, tmp_path / "branch", branch=point),
        Job(other, tmp_path / "other", branch=point, resume=True),
    ]
    carry_out(jobs, 2, tmp_path / "jobs")
    assert_same_run(tmp_path / "trunk", tmp_path / "branch")
    assert_equal(tensors_of(tmp_path / "trunk", 6, "rng-1"), tensors_of(tmp_path / "branch", 6, "rng-1"))
    assert_equal(tensors_of(tmp_path / "trunk", 4, "model"), tensors_of(tmp_path / "other", 4, "model"))
    assert tensors_of(tmp_path / "other", 4, "optimizer") == {}
    assert not (tmp_path / "other" / "checkpoints" / "step-00000002").exists()
