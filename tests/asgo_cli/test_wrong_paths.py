"""A path of the wrong kind is named, with the one that is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asgo_cli.app import app
from pipelines.config import RunConfig
from pipelines.errors import AsgoError
from pipelines.training.train import train
from tests.conftest import SilentReporter


@pytest.fixture
def run(small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the working directory, beside a folder as Hugging Face has it."""
    monkeypatch.chdir(tmp_path)
    train(small_config(), tmp_path / "run", SilentReporter())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "hf/model.safetensors").touch()
    return Path("run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train gpt --preset tiny --init-from hf/model.safetensors", "give the folder that it is in: hf"),
        ("export-metrics run/metrics.jsonl --out m.csv", "give the folder that it is in: run"),
        ("compare run/metrics.jsonl", "give the folder that it is in: run"),
        ("generate run/config.json", "give the folder that it is in: run"),
        ("generate hf", "hf/config.json: not a configuration"),
        ("train gpt --resume --out run/checkpoints/step-00000006", "the run that holds it: --out run"),
    ],
)
def test_a_path_of_the_wrong_kind_is_named_with_the_right_one(run: Path, line: str, message: str) -> None:
    with pytest.raises(AsgoError, match=message):
        app(line.split(), standalone_mode=False)
