"""A checkpoint is whole and verified, or it does not exist."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.training.checkpoint import (
    Snapshot,
    find_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    write_snapshot,
)
from pipelines.training.run_folder import checkpoint_folders
from pipelines.training.train import train
from tests.conftest import SilentReporter

Make = Callable[..., RunConfig]


@pytest.fixture
def run(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> Path:
    """A finished run with three checkpoints."""
    train(small_config(checkpoint__keep=3), tmp_path / "run", reporter)
    return tmp_path / "run"


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir())


def test_a_checkpoint_holds_what_it_should(run: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folders(run / "checkpoints")[-1])
    assert [path.name for path in files_of(checkpoint.folder)] == [
        "history.safetensors", "model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json",
    ]  # fmt: skip
    assert (checkpoint.step, checkpoint.state["tokens"], checkpoint.state["samples"]) == (6, 6 * 4 * 16, 24)
    assert checkpoint.config().optimizer.name == "accasro"
    assert [row["step"] for row in checkpoint.rows() if row["split"] == "val"] == [0, 3, 6]
    assert "token_embedding.weight" in checkpoint.model_tensors()
    assert "head.weight" not in checkpoint.model_tensors(), "a tied weight is saved once"


@pytest.mark.parametrize("index", range(5))
def test_any_altered_byte_is_found(run: Path, index: int) -> None:
    folder = checkpoint_folders(run / "checkpoints")[-1]
    path = files_of(folder)[index]
    content = path.read_bytes()
    for place in [0, len(content) // 2, len(content) - 1, *random.Random(index).choices(range(len(content)), k=20)]:
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        if path.suffix == ".json" and _means_the_same(altered, content):
            continue
        with pytest.raises(AsgoError, match=rf"{path.name}: (damaged|truncated)|not a checkpoint"):
            open_checkpoint(folder)


def _means_the_same(altered: bytes, content: bytes) -> bool:
    """A space that became another white space changes nothing that is read."""
    try:
        return bool(json.loads(altered) == json.loads(content))
    except ValueError:
        return False


@pytest.mark.parametrize("index", range(5))
def test_any_truncated_or_missing_file_is_found(run: Path, index: int) -> None:
    folder = checkpoint_folders(run / "checkpoints")[-1]
    path = files_of(folder)[index]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AsgoError, match=path.name):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(AsgoError, match=path.name):
        open_checkpoint(folder)


def test_loading_takes_the_newest_good_one_and_names_the_skipped(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    model = checkpoint_folders(run / "checkpoints")[-1] / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-7])
    checkpoint, skipped = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert len(skipped) == 1
    assert "step-00000006/model.safetensors: truncated" in skipped[0]
    train(small_config(checkpoint__keep=3), run, reporter, resume=True)
    assert open_checkpoint(run / "checkpoints" / "step-00000006").step == 6, "the damaged one was replaced"
    assert skipped[0] in reporter.notes


def test_a_run_without_a_good_checkpoint_is_left_as_it_is(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    """Beginning again in its folder would throw its records away."""
    for folder in checkpoint_folders(run / "checkpoints"):
        (folder / "model.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(AsgoError, match="no valid checkpoint; nothing was changed"):
        train(small_config(), run, reporter, resume=True)
    assert len(reporter.notes) == 3
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_a_kill_left_is_removed_and_never_taken_for_a_checkpoint(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".step-00000008.partial")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".step-00000001.outgoing")
    (checkpoints / "step-00000010").mkdir()
    checkpoint, skipped = newest_checkpoint(checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 6
    assert "not a checkpoint" in skipped[0]
    train(small_config(checkpoint__keep=3), run, reporter, resume=True)
    assert not list(checkpoints.glob(".*"))


def test_a_copy_with_a_name_of_its_own_is_neither_pruned_nor_taken_for_a_checkpoint(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    checkpoints = run / "checkpoints"
    copies = [checkpoints / name for name in ("step-00000002-best", "step-best", "step-2", ".step-best", "step-9")]
    for copy in copies:
        shutil.copytree(checkpoints / "step-00000002", copy)
    assert [folder.name[5:] for folder in checkpoint_folders(checkpoints)] == ["00000002", "00000004", "00000006"]
    shutil.rmtree(checkpoints / "step-00000006")
    train(small_config(checkpoint__keep=1), run, reporter, resume=True)
    assert sorted(checkpoints.iterdir()) == sorted([*copies, checkpoints / "step-00000006"])


def test_of_an_old_checkpoint_that_is_a_link_only_the_link_is_removed(
    run: Path, small_config: Make, reporter: SilentReporter, tmp_path: Path
) -> None:
    checkpoints, elsewhere = run / "checkpoints", tmp_path / "elsewhere"
    shutil.move(checkpoints / "step-00000002", elsewhere)
    (checkpoints / "step-00000002").symlink_to(elsewhere)
    shutil.rmtree(checkpoints / "step-00000006")
    train(small_config(checkpoint__keep=1), run, reporter, resume=True)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000006"]
    assert (elsewhere / "state.json").is_file()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """A step of nine digits is later than every one of eight."""
    for name in ("step-100000000", "step-99999999", "step-099999999", "step-00000001"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [
        "step-00000001", "step-99999999", "step-100000000",
    ]  # fmt: skip


def test_a_checkpoint_that_cannot_be_read_is_skipped_for_an_older_one(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    """A bad sector: the file opens, and reading it fails."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs a file that cannot be read, such as Linux's /proc/self/mem")
    state = run / "checkpoints/step-00000006/state.json"
    state.unlink()
    state.symlink_to("/proc/self/mem")  # nothing is mapped at address 0
    checkpoint, skipped = find_checkpoint(run)
    assert checkpoint.step == 4
    assert skipped == [f"skipped {state}: cannot be read: Input/output error"]
    train(small_config(checkpoint__keep=3), run, reporter, resume=True)
    assert skipped[0] in reporter.notes
    assert open_checkpoint(run / "checkpoints/step-00000006").step == 6


def test_checkpoints_that_cannot_be_listed_do_not_let_a_run_begin_anew(
    run: Path, small_config: Make, reporter: SilentReporter
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()  # no folder: listing it fails
    with pytest.raises(OSError, match="checkpoints"):
        train(small_config(), run, reporter, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk on the network answers so while another machine still reads a file."""
    rmtree = shutil.rmtree

    def not_empty(path: Path, **keywords: Any) -> None:
        if path.name.endswith(".pruned"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, **keywords)

    monkeypatch.setattr(shutil, "rmtree", not_empty)
    with pytest.warns(UserWarning, match="step-00000002: the old checkpoint could not be deleted: Directory not empty"):
        train(small_config(checkpoint__keep=1), tmp_path / "run", reporter)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run/checkpoints")] == ["step-00000006"]
    monkeypatch.undo()
    train(small_config(checkpoint__keep=1), tmp_path / "run", reporter, resume=True)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"], "tried again"


def test_a_checkpoint_of_another_run_is_not_resumed(
    run: Path, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    other = small_config(optimizer__name="asgo", model__d_ff=8, training__steps=8)
    train(other, tmp_path / "other", reporter)
    shutil.copytree(tmp_path / "other/checkpoints/step-00000008", run / "checkpoints/step-00000008")
    with pytest.raises(UsageError) as error:
        train(small_config(), run, reporter, resume=True)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{run}/checkpoints/step-00000008: cannot be resumed") for line in lines)
    assert any("model.d_ff is 8 in the run, 32 now" in line for line in lines)


def test_weights_of_another_model_are_named(run: Path, small_config: Make, reporter: SilentReporter) -> None:
    from pipelines.tensors import require_same_names
    from pipelines.training.device import pick_device
    from pipelines.training.gpt_task import GPTTask

    checkpoint = open_checkpoint(checkpoint_folders(run / "checkpoints")[-1])
    for change, message in [
        ({"model__d_ff": 8}, r"shape of 'blocks\.0\.feed_forward\.up\.weight' is \(32, 16\) there, \(8, 16\) here"),
        ({"model__n_layers": 2}, r"it has no 'blocks\.1\."),
        ({"model__bias": False}, r"bias' is not in this one"),
    ]:
        config = small_config(**change)
        model = GPTTask(config, pick_device(config.runtime)).model
        with pytest.raises(AsgoError, match=message):
            require_same_names(dict(model.named_parameters()), checkpoint.model_tensors(), "here")


def test_training_goes_on_while_a_checkpoint_is_written(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is held up until two more steps have been taken; it holds the step it was taken at."""
    moved_on = threading.Event()
    saved: list[Path] = []

    def held_up(parent: Path, snapshot: Snapshot, keep: int, check: Callable[[], None]) -> Path:
        assert moved_on.wait(30)
        saved.append(write_snapshot(parent, snapshot, keep, check))
        return saved[-1]

    class Watching(SilentReporter):
        def trained(self, row: Any) -> None:
            if row["step"] == 5:
                assert not saved
                moved_on.set()

    monkeypatch.setattr("pipelines.training.checkpoint_writer.write_snapshot", held_up)
    train(small_config(checkpoint__every=3, checkpoint__keep=9, metrics__every=1), tmp_path / "late", Watching())
    monkeypatch.undo()
    train(
        small_config(checkpoint__every=3, checkpoint__keep=9, metrics__every=1), tmp_path / "prompt", SilentReporter()
    )
    for folder in checkpoint_folders(tmp_path / "prompt" / "checkpoints"):
        for name in ("model", "optimizer", "rng-0"):
            late = tmp_path / "late" / "checkpoints" / folder.name / f"{name}.safetensors"
            assert late.read_bytes() == (folder / f"{name}.safetensors").read_bytes()
