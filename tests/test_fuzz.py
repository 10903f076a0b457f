"""Whatever people type, and whatever became of their files: a command succeeds, or ends with plain lines of error.

The cases are drawn anew only when this file or hypothesis changes, so that a failure comes again.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgo_cli.app import _report, app
from pipelines.config import RunConfig
from pipelines.resolve import flatten, read_preset
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import LONG


def cases(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count if LONG else count // 10,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def ends_well(*arguments: str) -> bool:
    """Whether the command did its work; asserts that otherwise it says in plain lines what is wrong."""
    words = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(words):
        try:
            code = app(list(arguments), standalone_mode=False) or 0
        except Exception as error:
            code = _report(error)
    assert code in (0, 1, 2)
    told = words.getvalue()
    assert "ASGO_DEBUG" not in told, f"not foreseen: {arguments}: {told}"
    if code != 0:
        lines = told.removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in lines), repr(told)
        assert any(line.startswith("error: ") for line in lines)
    return code == 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cases(10)
@given(st.text(min_size=1))
def test_hypothesis_keeps_its_tables_outside_of_the_working_tree(text: str) -> None:
    folder = Path(os.environ["HYPOTHESIS_STORAGE_DIRECTORY"])
    assert any(folder.iterdir())
    assert Path(__file__).parents[1] not in folder.parents


# --- Configurations

TINY = flatten(read_preset("tiny"))
KEYS = st.sampled_from([*sorted(TINY), "optimizer.beta2", "training", "model", "statistics.every", "runtime.device"])
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1e-3, 2**63, -0.0]))
VALUES = st.one_of(NUMBERS, st.booleans(), st.text(max_size=12), st.lists(NUMBERS, max_size=3))


@cases(400)
@given(key=st.one_of(KEYS, st.text(max_size=20)), value=st.one_of(VALUES, st.text(max_size=30)))
def test_any_setting(key: str, value: object) -> None:
    ends_well("train", "gpt", "--preset", "tiny", "--print-config", f"--set={key}={value}")


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """The content with a piece cut out, put in or changed."""

    def damage(start: int, length: int, piece: bytes) -> bytes:
        return whole[:start] + piece + whole[start + length :]

    return st.builds(damage, st.integers(0, len(whole)), st.integers(0, len(whole) // 2), st.binary(max_size=12))


PRESET = (Path(__file__).parents[1] / "pipelines" / "presets" / "tiny.toml").read_bytes()


@cases(400)
@given(content=st.one_of(damaged(PRESET), st.binary(max_size=40)))
def test_any_configuration_file(content: bytes) -> None:
    Path("my.toml").write_bytes(content)
    ends_well("train", "gpt", "--preset", "tiny", "--config", "my.toml", "--print-config")


SWEEP = b"""task = "gpt"
preset = "tiny"
seeds = [1, 2]
[grid]
optimizer.lr = [1e-3, 1e-2]
[[runs]]
name = "a"
optimizer.name = "asgo"
[[runs]]
name = "b"
optimizer.name = "adamw"
"""


@cases(200)
@given(content=damaged(SWEEP))
def test_any_sweep(content: bytes) -> None:
    Path("my.toml").write_bytes(content)
    ends_well("sweep", "my.toml", "--dry-run")


# --- Expressions

PARTS = ["x", "y", "pi", "e", "(", ")", "+", "-", "*", "**", "/", ",", "abs(", "log(", "minimum(", "1", "0", "2.5", " "]
PARTS += ["1e308", "__import__", ".", "lambda", "[", "]", "'", "x.real", "if", ":=", "²", "\0", "9" * 40, "(" * 70]


@cases(500)
@given(text=st.one_of(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.text(max_size=30)))
def test_any_expression(text: str) -> None:
    ends_well("viz", "--expression", text, "--steps", "1", "--out", "none/such.bmp")


# --- Files of runs and data


@pytest.fixture(scope="module")
def trained(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained to its end."""
    from pipelines.resolve import Layer, preset_layer, resolve

    layer = Layer("test", {**SMALL, "data.folder": str(token_folder), "optimizer.name": "asgo"})
    config: RunConfig = resolve([preset_layer("gpt", "tiny"), layer])
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, folder, SilentReporter())
    return folder


def damage(file: Path, draw: st.DataObject) -> None:
    file.write_bytes(draw.draw(damaged(file.read_bytes())))


@cases(200)
@given(draw=st.data())
def test_any_damage_to_a_checkpoint(draw: st.DataObject, trained: Path) -> None:
    shutil.rmtree("checkpoint", ignore_errors=True)
    shutil.copytree(max((trained / "checkpoints").iterdir()), "checkpoint")
    damage(draw.draw(st.sampled_from(sorted(Path("checkpoint").iterdir()))), draw)
    ends_well("export-metrics", "checkpoint", "--out", "metrics.csv")
    ends_well("generate", "checkpoint", "--prompt", "the", "--tokens", "1")


@cases(150)
@given(draw=st.data())
def test_any_damage_to_a_run(draw: st.DataObject, trained: Path) -> None:
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(trained, "run", ignore=shutil.ignore_patterns("checkpoints"))
    damage(Path("run") / draw.draw(st.sampled_from(["config.json", "metrics.jsonl"])), draw)
    ends_well("export-metrics", "run", "--out", "metrics.csv")


@cases(200)
@given(draw=st.data())
def test_any_damage_to_shards(draw: st.DataObject, token_folder: Path) -> None:
    shutil.rmtree("data", ignore_errors=True)
    shutil.copytree(token_folder, "data")
    file = draw.draw(st.sampled_from(sorted(Path("data").iterdir())))
    damage(file, draw)
    verified = ends_well("data", "verify", "data")
    if file.name != "manifest.json":  # of which another spelling may mean the same
        assert verified == (file.read_bytes() == (token_folder / file.name).read_bytes())
    ends_well("data", "info", "data")
    ends_well("train", "gpt", "--preset", "tiny", "--data", "data", "--dry-run")


PATHS = st.text(st.characters(exclude_characters="\0"), max_size=12)  # no command line can hold that one


@cases(150)
@given(name=st.one_of(PATHS, st.sampled_from(["run", ".", "..", "a" * 300, "a/b/c.csv", "run/x", "/"])))
def test_any_path_for_a_table(name: str, trained: Path) -> None:
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(trained, "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = (Path("run") / "metrics.jsonl").read_bytes()
    ends_well("export-metrics", "run", "--out", f"{name}")
    assert (Path("run") / "metrics.jsonl").read_bytes() == before
