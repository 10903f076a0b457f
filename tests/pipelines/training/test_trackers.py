"""Trackers get what metrics.jsonl gets, also when a run is resumed, and cannot stop a run."""

from __future__ import annotations

import json
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.training import trackers
from pipelines.training.distributed import Ranks
from pipelines.training.metrics import Row, read_lines
from pipelines.training.reporter import Reporter
from pipelines.training.train import plan, train

Curves = dict[str, list[tuple[int, float]]]
"""Steps and values by name, such as train/loss."""


def recorded(run: Path) -> Curves:
    """What metrics.jsonl holds."""
    curves: Curves = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in row.keys() - {"split", "step"}:
            curves.setdefault(f"{row['split']}/{key}", []).append((row["step"], row[key]))
    return curves


def in_float32(curves: Curves) -> Curves:
    return {name: [(step, float(np.float32(value))) for step, value in curve] for name, curve in curves.items()}


def go_back(run: Path, step: int) -> None:
    """Take away what a run saved after a step, as if it had been killed before it could, a second or more ago."""
    now = int(time.time())
    while int(time.time()) == now:  # the trackers' files are named by the second
        time.sleep(0.01)
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


class TestTensorBoard:
    def shown(self, accumulator: Any) -> Curves:
        accumulator.Reload()
        tags = accumulator.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}

    @pytest.fixture
    def accumulator(self, tmp_path: Path) -> Any:
        module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        return module.EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0})

    def test_shows_every_record_to_float32(
        self, small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, accumulator: Any
    ) -> None:
        train(small_config(runtime__track=["tensorboard"]), tmp_path / "run", reporter)
        assert self.shown(accumulator) == in_float32(recorded(tmp_path / "run"))
        assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]

    def test_shows_a_resumed_run_once_to_one_who_looks_on(
        self, small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, accumulator: Any
    ) -> None:
        train(small_config(runtime__track=["tensorboard"]), tmp_path / "run", reporter)
        for _ in range(2):
            assert self.shown(accumulator) == in_float32(recorded(tmp_path / "run"))
            go_back(tmp_path / "run", 4)
            train(small_config(runtime__track=["tensorboard"]), tmp_path / "run", reporter, resume=True)
        assert self.shown(accumulator) == in_float32(recorded(tmp_path / "run"))
        assert len(list((tmp_path / "run/tensorboard").iterdir())) == 2

    def test_shows_what_came_before_it_was_asked_for(
        self, small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, accumulator: Any
    ) -> None:
        train(small_config(), tmp_path / "run", reporter)
        go_back(tmp_path / "run", 4)
        train(small_config(runtime__track=["tensorboard"]), tmp_path / "run", reporter, resume=True)
        assert self.shown(accumulator) == in_float32(recorded(tmp_path / "run"))
        times = [event.wall_time for event in accumulator.Scalars("train/loss")]
        assert times == sorted(set(times))


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log, which .wandb files are, after a header of 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class TestWandb:
    @pytest.fixture(autouse=True)
    def wandb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        wandb.teardown()  # it has read the environment of the test before
        yield wandb
        wandb.teardown()

    def kept(self, folder: Path) -> Curves:
        import wandb
        from wandb.proto.wandb_internal_pb2 import Record

        wandb.teardown()  # waits for the process that writes
        curves: Curves = {}
        (path,) = folder.glob("*.wandb")
        for content in records_of(path):
            record = Record.FromString(content)
            figures = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name in figures:
                if "/" in name:
                    curves.setdefault(name, []).append((figures["step"], figures[name]))
        return curves

    def test_offline_keeps_every_record_exactly(
        self,
        small_config: Callable[..., RunConfig],
        tmp_path: Path,
        reporter: Reporter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        train(small_config(runtime__track=["wandb"]), tmp_path / "run", reporter)
        (first,) = (tmp_path / "run/wandb").glob("offline-run-*")
        assert self.kept(first) == recorded(tmp_path / "run")

        go_back(tmp_path / "run", 4)
        train(small_config(runtime__track=["wandb"]), tmp_path / "run", reporter, resume=True)
        latest = (tmp_path / "run/wandb/latest-run").resolve()
        assert self.kept(latest) == recorded(tmp_path / "run")
        assert {path.name for path in (tmp_path / "run/wandb").rglob("*.wandb")} == {
            f"run-{(tmp_path / 'run/wandb/run-id').read_text()}.wandb"
        }

    def test_sends_a_resumed_run_what_the_server_has_not(
        self,
        small_config: Callable[..., RunConfig],
        tmp_path: Path,
        reporter: Reporter,
        monkeypatch: pytest.MonkeyPatch,
        wandb: Any,
    ) -> None:
        """The server tells how many lines it has, those of steps that will be trained again among them."""
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(wandb.Run, "step", property(lambda run: 4))
        rows = [
            Row(split="train", step=step, tokens=step, samples=step, epoch=0.0, elapsed_s=0.0) for step in range(1, 7)
        ]
        config = small_config(runtime__track=["wandb"])
        with trackers.tracked(reporter, config, tmp_path, rows[:3], Ranks()) as told:
            for row in rows[3:]:
                told.validated(row)
        assert self.kept(tmp_path / "wandb/latest-run")["train/tokens"] == [(5, 5), (6, 6)]

    def test_without_a_key_asks_nobody_and_trains(
        self, small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter
    ) -> None:
        with pytest.warns(UserWarning, match="wandb is dropped, the run continues: no API key"):
            rows = train(small_config(runtime__track=["wandb"]), tmp_path / "run", reporter)
        assert rows[-1]["step"] == 6


class Recording:
    """A tracker that keeps its records, and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.rows: list[Row] = []
        self.ends: list[bool] = []

    def start(self, run: Path, config: RunConfig, rows: Sequence[Row], reporter: Reporter) -> Recording:
        self._fail("start")
        self.rows = list(rows)
        return self

    def record(self, row: Row) -> None:
        self.rows.append(row)
        self._fail("record" if len(self.rows) == 3 else "")

    def close(self, failed: bool) -> None:
        self.ends.append(failed)
        self._fail("close")

    def _fail(self, when: str) -> None:
        if when and when == self.failing:
            raise ConnectionError(f"no answer\nat {when}")


@pytest.mark.parametrize("when", ["start", "record", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(
    when: str,
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing, sound = Recording(when), Recording()
    monkeypatch.setattr(trackers, "_TRACKERS", {"tensorboard": failing.start, "wandb": sound.start})
    monkeypatch.setattr("pipelines.training.train.require_trackers", lambda names: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = train(small_config(runtime__track=["tensorboard", "wandb"]), tmp_path / "run", reporter)
    told = [str(warning.message) for warning in caught if "is dropped" in str(warning.message)]
    assert told == [f"tensorboard is dropped, the run continues: no answer at {when}"]
    assert len(failing.rows) == {"start": 0, "record": 3, "close": len(rows)}[when]
    assert sound.rows == rows == read_lines(tmp_path / "run/metrics.jsonl")
    assert sound.ends == [False]


def test_a_folder_that_takes_no_files_costs_the_tracker_only(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter
) -> None:
    pytest.importorskip("tensorboard")
    train(small_config(), tmp_path / "run", reporter)
    go_back(tmp_path / "run", 4)
    (tmp_path / "run/tensorboard").touch()  # where the folder should be; root may write to any folder
    with pytest.warns(UserWarning, match="tensorboard is dropped"):
        rows = train(small_config(runtime__track=["tensorboard"]), tmp_path / "run", reporter, resume=True)
    assert rows[-1]["step"] == 6


def test_a_run_that_fails_ends_as_failed(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recording()
    monkeypatch.setattr(trackers, "_TRACKERS", {"wandb": tracker.start})
    config = small_config(runtime__track=["wandb"])
    with (
        pytest.raises(KeyboardInterrupt),
        trackers.tracked(reporter, config, tmp_path, [], Ranks()),
    ):
        raise KeyboardInterrupt
    assert tracker.ends == [True]


def test_only_the_first_process_tracks(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter
) -> None:
    config = small_config(runtime__track=["tensorboard"])
    with trackers.tracked(reporter, config, tmp_path, [], Ranks(rank=1, size=2)):
        assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "distribution", nothing_installed)
    config = small_config(runtime__track=["wandb"])
    message = r"--track wandb: not installed; pip install 'asgo\[wandb\]'"
    with pytest.raises(UsageError, match=message):
        train(config, tmp_path / "run", reporter)
    with pytest.raises(UsageError, match=message):
        plan(config)
    assert not (tmp_path / "run").exists()
