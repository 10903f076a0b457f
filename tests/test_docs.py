"""The documents keep their promises: their Python runs, and their commands are such that the program takes them."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asgo_cli.app import app
from pipelines.exchange.export import export_model
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.train import train
from tests.command_lines import parse
from tests.conftest import SMALL, SilentReporter
from tests.pipelines.exchange.test_classifier_export import save

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands() -> Iterator[Any]:
    """Every line `asgo ...` of every block, without the comment behind it."""
    for page in PAGES:
        for text in blocks(page, "") + blocks(page, "bash") + blocks(page, "sh"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split(" > ")[0], comments=True)
                if words[:1] == ["asgo"] and "..." not in words:
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_in_the_documents_is_understood(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize("words", [each for each in commands() if each.values[0][:1] == ["train"]])
def test_the_settings_of_a_run_in_the_documents_are_good(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if {"--resume", "--branch", "--config", "--init-from", "lion", "./lion.py:Lion", "--dry-run"} & set(words):
        pytest.skip("takes its settings from a run, a file or an optimizer that is not here")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words, "--print-config"])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []


def make_a_run_with_statistics(token_folder: Path) -> None:
    layer = Layer("test", {**SMALL, "data.folder": str(token_folder), "statistics.every": 2})
    train(resolve([preset_layer("gpt", "tiny"), layer]), Path("runs/tiny-accasro-s42"), SilentReporter())


def make_an_exported_classifier(_token_folder: Path) -> None:
    _, checkpoint = save(Path("runs"), "efficientnet_b1")
    export_model(checkpoint, "torchvision", Path("models/b1"))


MAKE = {"layers.md": make_a_run_with_statistics, "export.md": make_an_exported_classifier}
"""What the Python of a page begins with."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name in MAKE:
        MAKE[page.name](token_folder)
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks
        for text in blocks(page, "python"):
            exec(compile(text, str(page), "exec"), names)
