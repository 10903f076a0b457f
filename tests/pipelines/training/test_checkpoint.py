"""A checkpoint is whole and verified, or it does not exist."""

from __future__ import annotations

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
    with pytest.raises(AsgoError, match="no checkpoint is good, so nothing was touched"):
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
    from pipelines.training.device import pick_device
    from pipelines.training.gpt_task import GPTTask
    from pipelines.training.weights import require_same_names

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
