"""Training on a GPU: it learns, and goes on after a death where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from optim import OPTIMIZER_NAMES
from pipelines.config import RunConfig
from pipelines.training.metrics import read_lines
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_resume import Dies, die_at

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_trains_and_resumes(
    name: str,
    precision: str,
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(
        runtime__device="cuda", optimizer__name=name, training__precision=precision, model__dropout=0.1
    )
    whole = train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        die_at(patch, step=3)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    resumed = train(config, tmp_path / "resumed", reporter, resume=True)
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert resumed[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-3)
    assert all(0 < row["optimizer_ms"] < row["step_ms"] for row in whole if row["split"] == "train")


@pytest.mark.parametrize("sharing", [{}, {"runtime__shard_optimizer": True}, {"runtime__shard_model": True}])
@pytest.mark.parametrize("name", ["asgo", "accasro", "adamw"])
def test_a_process_group_of_one_gpu_trains_like_the_process_alone(
    name: str, sharing: dict[str, bool], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Through NCCL, DDP and FSDP2."""
    settings = {"runtime__device": "cuda", "optimizer__name": name, "training__precision": "fp32"}
    alone = train(small_config(**settings), tmp_path / "alone", SilentReporter())
    carry_out([Job(small_config(**settings, **sharing), tmp_path / "group")], 1, tmp_path)
    rows = read_lines(tmp_path / "group" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
