"""The benchmark of decoded images times the same work for all."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from asgo_cli.app import app
from pipelines.benchmarks import decoded_loader
from pipelines.benchmarks.decoded_loader import NONE, SMALL, TORCHVISION, bench_decoded_loader
from pipelines.errors import AsgoError, UsageError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images."""
    for name, value in {"BATCH_SIZE": 4, "BATCHES": 3}.items():
        monkeypatch.setattr(decoded_loader, name, value)


def test_all_ways_are_timed_in_turns() -> None:
    turns = []
    report = bench_decoded_loader(0, 2, lambda *turn: turns.append(turn))
    names = [TORCHVISION, SMALL, NONE]
    assert turns == [(name, turn, 6) for turn, name in enumerate(names * 2)]
    assert [each.name for each in report.contestants] == names
    assert all(len(each.rates) == 2 and min(each.rates) > 0 for each in report.contestants)
    assert report.as_json()["loading"][0]["speedup"] == 1


def test_the_command_measures_them_and_takes_no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_loader, "default_workers", lambda: 0)
    shown = CliRunner().invoke(app, ["bench", "loader", "--decoded", "--repeats", "1", "--json"])
    assert [each["name"] for each in json.loads(shown.stdout)["loading"]] == [TORCHVISION, SMALL, NONE]
    refused = CliRunner().invoke(app, ["bench", "loader", "photographs", "--decoded"])
    assert isinstance(refused.exception, UsageError)


def test_other_batches_are_an_error() -> None:
    with pytest.raises(AsgoError, match="unexpected batch"):
        decoded_loader._rate([torch.zeros(4, 3, 32, 32)])
