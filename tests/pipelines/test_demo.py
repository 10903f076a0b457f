"""The demo's way from text to figures, with the library cut to a few files and the model to a few weights."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asgo_cli.app import app
from pipelines import demo
from pipelines.resolve import Layer, preset_layer, resolve
from tests.conftest import SMALL


def test_the_standard_library_has_text_enough() -> None:
    sources = demo.library_sources()
    assert Path(sysconfig.get_path("stdlib"), "argparse.py") in sources
    assert sum(path.stat().st_size for path in sources) > 5_000_000
    assert not any("test" in path.parts or "site-packages" in path.parts for path in sources)


def test_the_demo_trains_three_optimizers_and_a_second_call_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = demo.library_sources()[:40]
    monkeypatch.setattr(demo, "library_sources", lambda: few)
    monkeypatch.setattr(
        demo,
        "demo_config",
        lambda name, data: resolve(
            [preset_layer("gpt", "tiny"), Layer("test", {**SMALL, "optimizer.name": name, "data.folder": str(data)})]
        ),
    )
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, ["demo"])
    assert first.exit_code == 0, first.output
    out = Path("runs/demo")
    for name in ("losses.png", "rosenbrock.png", "metrics.csv"):
        assert (out / name).stat().st_size > 1000
    for optimizer in ("accasro", "asgo", "adamw"):
        assert optimizer in first.stdout
        assert f"{optimizer},{optimizer}," in (out / "metrics.csv").read_text()
    assert "asgo generate runs/demo/runs/" in first.stderr
    second = CliRunner().invoke(app, ["demo"])
    assert second.exit_code == 0
    assert second.stdout == first.stdout, "finished runs are shown, not trained again"


def test_the_demos_runs_differ_in_the_optimizer_and_its_schedule_only() -> None:
    configs = [demo.demo_config(name, Path("data")).model_dump() for name in demo.OPTIMIZERS]
    for config in configs:
        config.pop("optimizer")
        config.pop("schedule")
    assert configs[0] == configs[1] == configs[2]
