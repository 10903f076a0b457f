"""A compiled model trains like one that is not, and its checkpoints are the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import RunConfig
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import long


@long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_trains_alike(
    small_config: Callable[..., RunConfig], tmp_path: Path, reporter: SilentReporter
) -> None:
    runs = {}
    for compiled in (False, True):
        config = small_config(runtime__compile=compiled, training__steps=2, evaluation__every=2)
        runs[compiled] = train(config, tmp_path / str(compiled), reporter)
    for plain, compiled_row in zip(runs[False], runs[True], strict=True):
        # Sums in another order: 84 roundings of a float32. A wrong kernel shows in the first digits.
        assert plain["loss"] == pytest.approx(compiled_row["loss"], rel=1e-5)
    one, other = (
        open_checkpoint(tmp_path / str(c) / "checkpoints/step-00000002").model_tensors() for c in (False, True)
    )
    assert one.keys() == other.keys()
