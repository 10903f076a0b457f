"""The interactive pages of `asgo viz`: their data, and what a browser makes of them."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.functions import FUNCTIONS
from models.matrix_problems import PROBLEMS
from pipelines.analysis.matrix_figure import write_losses
from pipelines.analysis.matrix_losses import run_losses
from pipelines.analysis.optimizer_settings import MATRICES, default_settings, parse_settings
from pipelines.analysis.trajectories import Trajectory, run_trajectories
from pipelines.analysis.trajectory_page import keep_corners, write_trajectory_page

CHROMIUM = shutil.which("chromium")
SETTINGS = default_settings()


def panels_of(path: Path) -> list[dict[str, Any]]:
    """The data of each plot in a page."""
    data = re.findall(r'<script class="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))
    return [json.loads(text) for text in data]


def rosenbrock(steps: int = 400) -> list[Trajectory]:
    return run_trajectories(FUNCTIONS["rosenbrock"], SETTINGS, steps=steps)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trajectory], Path]:
    """One page of two functions, one of which has a name and a formula that would be code."""
    path = tmp_path_factory.mktemp("page") / "new" / "a.html"
    hostile = replace(FUNCTIONS["abs_sum"], title="</script><b id=injected>", formula="<img src=x onerror=alert(1)>")
    trajectories = rosenbrock()
    write_trajectory_page([trajectories, run_trajectories(hostile, SETTINGS, steps=30)], path)
    return trajectories, path


def test_a_page_holds_the_numbers_of_the_trajectories(page: tuple[list[Trajectory], Path]) -> None:
    trajectories, path = page
    panel = panels_of(path)[0]
    for index, run in enumerate(trajectories):
        line, last, values = (trace for trace in panel["traces"] if trace.get("legendgroup") == str(index))
        assert line["name"] == run.settings.label
        assert (line["x"], line["y"], line["customdata"]) == (last["x"], last["y"], last["customdata"])
        for x, y, (step, value) in zip(line["x"], line["y"], line["customdata"], strict=True):
            assert [x, y] == pytest.approx(run.points[step], rel=1e-5)
            assert value == pytest.approx(run.values[step], rel=1e-5)
        assert (line["customdata"][0][0], line["customdata"][-1][0]) == (0, 400)
        # Rosenbrock's minimum is 0: the height is the value; 401 points are not thinned.
        assert values["x"] == list(range(401))
        assert values["y"] == pytest.approx(run.values, rel=1e-5)
    start, optimum = panel["traces"][-2:]
    assert (start["name"], start["x"], start["y"]) == ("start", [0], [-6])
    assert (optimum["name"], optimum["x"], optimum["y"]) == ("optimum", [1], [1])
    assert (panel["frames"][0], panel["frames"][-1]) == (0, 400)


def test_contours_are_the_functions_heights(page: tuple[list[Trajectory], Path]) -> None:
    contour = panels_of(page[1])[0]["traces"][0]
    assert contour["type"] == "contour"
    x, y = np.meshgrid(contour["x"], contour["y"])
    heights = np.log10((1 - x) ** 2 + 100 * (y - x**2) ** 2)
    levels = np.array(contour["z"])
    shown = levels > levels.min()  # what is lowest is cut
    assert abs(levels - heights)[shown].max() < 0.01
    assert shown.mean() > 0.99


def test_only_points_that_show_nothing_are_left_out() -> None:
    rng = np.random.default_rng(0)
    points = np.cumsum(rng.normal(0, 0.3, (500, 2)), axis=0)
    fineness = np.full_like(points, 0.5)
    fineness[250:] = 0.1
    kept = keep_corners(points, fineness)
    assert (kept[0], kept[-1]) == (0, 499)
    assert 100 < len(kept) < 490
    for index in set(range(500)) - set(kept.tolist()):
        before = kept[kept < index].max()
        assert (abs(points[index] - points[before]) < fineness[index]).all()


def test_a_long_run_stays_light_and_keeps_its_peaks(tmp_path: Path) -> None:
    steps = 20_000
    turns = np.linspace(0.8, 40, steps + 1)
    points = np.stack([np.cos(turns), np.sin(turns)], axis=1) * np.linspace(3, 0, steps + 1)[:, None]
    values = abs(points).sum(axis=1)
    values[12_345] = 1000
    run = Trajectory(FUNCTIONS["abs_sum"], parse_settings("adam"), steps, points, values)
    write_trajectory_page([[run]], tmp_path / "a.html")
    (panel,) = panels_of(tmp_path / "a.html")
    line, _, curve = (trace for trace in panel["traces"] if trace.get("legendgroup") == "0")
    assert len(line["x"]) < 8000
    assert len(curve["x"]) <= 1200
    assert 1000 in curve["y"]
    assert curve["x"][curve["y"].index(1000)] == 12_345


def test_a_divergence_and_a_flat_function_can_be_shown(tmp_path: Path) -> None:
    settings = [parse_settings("sgd-momentum:lr=1"), parse_settings("adam")]
    diverged = run_trajectories(FUNCTIONS["rosenbrock"], settings, steps=50)
    flat = replace(FUNCTIONS["booth"], evaluate=lambda x, y: 0 * (x + y), optimum=None)
    write_trajectory_page([diverged, run_trajectories(flat, settings, steps=5)], tmp_path / "a.html")
    assert len(panels_of(tmp_path / "a.html")) == 2


def test_names_and_formulas_are_text_and_nothing_else(page: tuple[list[Trajectory], Path]) -> None:
    text = page[1].read_text(encoding="utf-8")
    assert "<b id=injected>" not in text
    assert "<img src=x" not in text
    assert html.escape("<img src=x onerror=alert(1)>") in text


def test_a_page_of_losses_holds_them(tmp_path: Path) -> None:
    runs = run_losses(PROBLEMS["matrix_factorization"], [parse_settings("adamw", MATRICES)], steps=30)
    write_losses([runs], tmp_path / "a.html")
    (panel,) = panels_of(tmp_path / "a.html")
    curve, target = panel["traces"]
    assert curve["y"] == pytest.approx(runs[0].values, rel=1e-5)
    assert curve["x"] == list(range(31))
    assert target["y"] == pytest.approx([runs[0].values[0] / 1000] * 2)
    assert panel["frames"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_page_without_an_error(page: tuple[list[Trajectory], Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    address = page[1].resolve().as_uri()
    result = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=240, check=True)
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    assert result.stdout.count('class="main-svg"') >= 2
    for expected in ("Adam, lr 0.2", "step 400 of 400", "value above the optimum"):
        assert expected in result.stdout
    assert 'id="injected"' not in result.stdout
