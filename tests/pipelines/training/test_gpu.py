"""Training on a GPU: it learns, and goes on after a death where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from optim import OPTIMIZER_NAMES
from pipelines.config import RunConfig
from pipelines.training.train import train
from tests.conftest import SilentReporter
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
