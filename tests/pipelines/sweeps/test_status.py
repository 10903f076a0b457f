"""What a sweep finds of its runs: done, partial, new, or in the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.sweeps.definition import SweepRun
from pipelines.sweeps.slots import Slot, make_slots
from pipelines.sweeps.status import check_data, run_status, run_statuses
from pipelines.training.train import train
from tests.conftest import SilentReporter


@pytest.fixture
def trained(small_config: Callable[..., RunConfig], reporter: SilentReporter, tmp_path: Path) -> SweepRun:
    """A finished run in tmp_path/a-s42."""
    run = SweepRun("a-s42", "a", small_config(checkpoint__keep=3))
    train(run.config, tmp_path / run.name, reporter)
    return run


def test_a_run_is_done_with_its_last_checkpoint_and_partial_with_an_earlier_one(
    trained: SweepRun, tmp_path: Path
) -> None:
    found = run_status(trained, tmp_path)
    assert (found.state, found.step, found.tokens, found.tokens_left) == ("done", 6, 6 * 4 * 16, 0)
    assert found.final_metrics().keys() == {"loss"}
    checkpoints = tmp_path / "a-s42/checkpoints"
    weights = checkpoints / "step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = run_status(trained, tmp_path)
    assert (found.state, found.step, found.tokens_left) == ("partial", 4, 2 * 4 * 16), "a damaged one does not count"
    assert found.final_metrics() == {}
    shutil.rmtree(checkpoints)
    found = run_status(trained, tmp_path)
    assert (found.state, found.step) == ("done", 6), "the checkpoints of a finished run may be removed"
    metrics = tmp_path / "a-s42/metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:-1]))
    found = run_status(trained, tmp_path)
    assert (found.state, found.step) == ("partial", 0)
    shutil.rmtree(tmp_path / "a-s42")
    assert run_status(trained, tmp_path).state == "new"


def test_folders_of_other_runs_and_of_other_things_are_named_all_at_once(
    trained: SweepRun, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "b-s42").mkdir()
    (tmp_path / "b-s42/manifest.json").touch()
    longer = SweepRun("a-s42", "a", small_config(training__steps=9, runtime__timeout_s=5.0))
    with pytest.raises(UsageError) as error:
        run_statuses([longer, SweepRun("b-s42", "b", small_config())], tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/a-s42: training.steps is 6 in the run, 9 now; choose another --out",
        f"{tmp_path}/b-s42: cannot begin a new run here: {tmp_path}/b-s42/manifest.json exists; choose another --out",
    ]


def test_data_that_is_not_there_is_named_before_anything_starts(small_config: Callable[..., RunConfig]) -> None:
    configs = [
        small_config(data__folder="nowhere/a"),
        small_config(data__folder="nowhere/b"),
        small_config(data__folder="nowhere/a"),
    ]
    with pytest.raises(UsageError) as error:
        check_data([SweepRun(name, name, config) for name, config in zip("xyz", configs, strict=True)])
    first, second = str(error.value).splitlines()
    assert first.startswith("nowhere/a: no such data folder")
    assert second.startswith("nowhere/b: no such data folder")


def test_slots_share_the_cores_and_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert make_slots(None, None, on_gpus=False) == [Slot(8)]
    assert make_slots(3, None, on_gpus=False) == [Slot(2)] * 3
    assert make_slots(3, None, on_gpus=False)[0].environment() == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert make_slots(None, None, on_gpus=True) == [Slot(4, "5"), Slot(4, "7")]
    assert [slot.gpu for slot in make_slots(3, None, on_gpus=True)] == ["5", "7", "5"]
    assert make_slots(None, 1, on_gpus=True) == [Slot(8, "5")]
    assert Slot(8, "5").environment()["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(UsageError, match="--gpus 3: this machine has 2"):
        make_slots(None, 3, on_gpus=True)
