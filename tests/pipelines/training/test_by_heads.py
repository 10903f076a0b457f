"""`optimizer.by_heads`: from the command line to the weights, and through a kill."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asgo_cli import app as command_line
from optim import build_optimizer
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.training.gpt_task import GPTTask
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.pipelines.training.double_precision import bound, double_precision
from tests.pipelines.training.test_resume import Dies, assert_same_run, die_at, final_tensors

Make = Callable[..., RunConfig]
MATRIX = ["asgo", "dasgo", "muon", "shampoo"]
ATTENTION = "blocks.0.attention"


def trained_by_hand(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights after the run's steps, in a loop that splits queries and keys itself."""
    torch.manual_seed(config.seed)
    task = GPTTask(config, torch.device("cpu"))
    blocks = {f"{ATTENTION}.{part}.weight": config.model.n_heads for part in ("query", "key")}
    optimizer = build_optimizer(
        task.model, config.optimizer.name, config.training.steps, lr=config.optimizer.lr, row_blocks=blocks
    )
    for step in range(config.training.steps):
        optimizer.zero_grad()
        for batch in task.micro_batches(step):
            task.loss(batch).backward()
        optimizer.step()
    return {name: param.detach() for name, param in task.model.named_parameters()}


@pytest.mark.parametrize("name", MATRIX)
def test_a_run_by_heads_is_a_run_with_queries_and_keys_split(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    settings = {
        "optimizer__name": name,
        "schedule__kind": "constant",
        "schedule__warmup_fraction": 0.0,
        "training__precision": "fp32",
        "training__max_grad_norm": 1e9,  # never reached: the last digit of a norm would change every gradient
    }
    config = small_config(optimizer__by_heads=True, **settings)
    with double_precision():
        train(config, tmp_path / "heads", reporter)
        train(small_config(**settings), tmp_path / "whole", reporter)
        by_hand = trained_by_hand(config)
    heads, whole = final_tensors(tmp_path / "heads"), final_tensors(tmp_path / "whole")
    for key, expected in by_hand.items():
        torch.testing.assert_close(
            heads[f"model:{key}"], expected, rtol=bound(6), atol=0.02 * bound(6)
        )  # they begin at 0.02
    assert not torch.allclose(heads[f"model:{ATTENTION}.key.weight"], whole[f"model:{ATTENTION}.key.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", MATRIX)
def test_a_run_by_heads_resumes_exactly(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, accumulation, clipping, and a death between two checkpoints."""
    config = small_config(
        optimizer__name=name, optimizer__by_heads=True, model__dropout=0.2, training__micro_batch_size=2
    )
    train(config, tmp_path / "whole", reporter)
    with monkeypatch.context() as patch:
        die_at(patch, step=3)
        with pytest.raises(Dies):
            train(config, tmp_path / "resumed", reporter)
    train(config, tmp_path / "resumed", reporter, resume=True)
    assert any("step-00000002" in note for note in reporter.notes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("begun", [True, False], ids=["heads", "whole"])
def test_a_run_is_not_continued_the_other_way(
    begun: bool, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(optimizer__name="dasgo", optimizer__by_heads=begun), tmp_path / "run", reporter)
    with pytest.raises(UsageError, match=f"optimizer.by_heads is {begun} in the run, {not begun} now$"):
        train(
            small_config(optimizer__name="dasgo", optimizer__by_heads=not begun),
            tmp_path / "run",
            reporter,
            resume=True,
        )


def test_a_run_from_before_these_settings_goes_on_as_it_was(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config(optimizer__name="dasgo")
    train(config, tmp_path / "run", reporter)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["config"]["optimizer"]["by_heads"], record["config"]["optimizer"]["no_decay"]
    del record["config"]["schedule"]["initial_lr_fraction"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert train(config, tmp_path / "run", reporter, resume=True)[-1]["step"] == 6


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run `asgo train gpt` in an empty folder; returns its exit code and what it printed and said."""
    monkeypatch.chdir(tmp_path)
    small = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["asgo", "train", "gpt", *map(str, arguments), *small])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


BY_HEADS = ("--set", "optimizer.by_heads=true")


def test_the_command_line_shows_trains_and_resumes_by_heads(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    chosen = ("--preset", "tiny", "--optimizer", "asgo", "--data", token_folder)
    assert tomllib.loads(asgo(*chosen, "--print-config")[1])["optimizer"]["by_heads"] is False
    printed = asgo(*chosen, *BY_HEADS, "--print-config")[1]
    assert tomllib.loads(printed)["optimizer"]["by_heads"] is True
    Path("mine.toml").write_text(printed, encoding="utf-8")
    code, _, err = asgo("--config", "mine.toml", "--out", "run")
    assert code == 0, err
    assert asgo("--resume", "--out", "run")[0] == 0, "the run knows that it is by heads"
    code, _, err = asgo("--resume", "--out", "run", "--set", "optimizer.by_heads=false")
    assert (code, err.count("\n")) == (2, 1)
    assert "optimizer.by_heads is True in the run, False now" in err


def test_the_command_line_refuses_heads_for_an_optimizer_without_matrices(asgo, token_folder: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = asgo("--preset", "tiny", "--optimizer", "adamw", "--data", token_folder, *BY_HEADS)
    assert (code, err.count("\n")) == (2, 1)
    assert "--set: optimizer.by_heads: " in err
    assert "asgo, dasgo, muon, shampoo" in err
    assert list(Path().iterdir()) == []
