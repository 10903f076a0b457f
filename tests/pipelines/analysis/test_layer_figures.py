"""The figures of layer statistics show what the run recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from pipelines.analysis.layer_figures import draw_layers, kinds_of, scale_shares, write_layer_figures
from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.training.statistics_file import Header, Layer, Preconditioner, Record, read_statistics, statistics_file
from pipelines.training.train import train
from tests.conftest import SilentReporter

Make = Callable[..., RunConfig]
SHAPES = {
    "embedding.weight": [9, 4],
    "blocks.0.up.weight": [8, 4],
    "blocks.0.up.bias": [8],
    "blocks.1.up.weight": [8, 4],
}


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes}


def layer(ratio: float | None) -> Layer:
    return Layer(grad_norm=1.0, weight_norm=1.0, update_norm=1.0, update_to_weight=ratio)


def write_run(run: Path, layers: list[dict[str, Layer]]) -> None:
    """A record each 100 steps."""
    run.mkdir()
    for index, of_step in enumerate(layers, 1):
        record = Record(step=100 * index, cost_ms=1.0, layers=of_step)
        statistics_file(run).append(Header(shapes=SHAPES, scale_edges=None), record)


def test_weight_matrices_of_one_kind_share_a_line() -> None:
    assert kinds_of(SHAPES) == {
        "embedding": ["embedding.weight"],
        "blocks.up": ["blocks.0.up.weight", "blocks.1.up.weight"],
    }


def test_lines_are_medians_and_maps_show_every_parameter(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ratios = random.uniform(1e-4, 1e-2, size=(5, len(SHAPES)))
    layers = [{name: layer(ratio) for name, ratio in zip(SHAPES, row, strict=True)} for row in ratios.tolist()]
    layers[2]["blocks.0.up.bias"]["update_to_weight"] = None  # of a bias that is all zeros
    write_run(tmp_path / "run", layers)
    shown = panels(dict(draw_layers(tmp_path / "run"))["layer-updates"])
    embedding, up = (np.asarray(line.get_ydata()) for line in shown["Weight matrices"].get_lines())
    np.testing.assert_array_equal(embedding, ratios[:, 0])
    np.testing.assert_allclose(up, ratios[:, [1, 3]].mean(axis=1))  # the median of two
    (mesh,) = (child for child in shown["All parameters"].get_children() if isinstance(child, QuadMesh))
    values = mesh.get_array()
    assert isinstance(values, np.ma.MaskedArray)
    assert np.argwhere(values.mask).tolist() == [[2, 2]]
    np.testing.assert_array_equal(values.filled(0.0), np.where(values.mask, 0.0, ratios.T))


def test_a_singular_preconditioner_is_drawn_at_the_limit_of_float32(tmp_path: Path) -> None:
    def matrix(condition: float | None, rank: int) -> dict[str, Layer]:
        found = Preconditioner(
            side=4, largest=1.0, smallest=0.0, rank=rank, condition=condition, largest_condition=condition
        )
        return {"blocks.0.up.weight": Layer(**layer(0.1), preconditioners={"preconditioner": found})}

    write_run(tmp_path / "run", [matrix(None, 3), matrix(50.0, 4)])
    shown = panels(dict(draw_layers(tmp_path / "run"))["layer-preconditioners"])
    line, limit = shown["Preconditioner"].get_lines()
    np.testing.assert_array_equal(np.asarray(line.get_ydata()), [2.0**23, 50.0])
    np.testing.assert_array_equal(limit.get_ydata(), [2.0**23, 2.0**23])
    (ranks,) = shown["Preconditioner: numerical rank"].get_lines()
    np.testing.assert_array_equal(ranks.get_ydata(), [0.75, 1.0])


@pytest.mark.parametrize("name", ["accasro", "shampoo", "adamw"])
def test_a_run_is_drawn_by_what_its_optimizer_has(
    name: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """And from one record, which is less than a line."""
    train(small_config(optimizer__name=name, statistics__every=6), tmp_path / "run", reporter)
    own = {"accasro": ["layer-scales"], "shampoo": ["layer-preconditioners"], "adamw": []}[name]
    assert [name for name, _ in draw_layers(tmp_path / "run")] == ["layer-updates", "layer-norms", *own]


def test_figures_are_files_for_screen_and_print(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    """Of a run whose first step, at a learning rate of 0, moves nothing, and which is killed after it."""
    warm_up = {"schedule__warmup_fraction": 0.0, "schedule__warmup_steps": 1}
    config = small_config(optimizer__name="asgo", training__steps=1, statistics__every=1, **warm_up)
    train(config, tmp_path / "run", reporter)
    paths = write_layer_figures(tmp_path / "run", tmp_path / "figures")
    names = ["layer-updates", "layer-norms", "layer-preconditioners"]
    assert paths == [tmp_path / "figures" / f"{name}{suffix}" for name in names for suffix in (".png", ".pdf")]
    assert all(path.read_bytes().startswith((b"\x89PNG", b"%PDF")) for path in paths)


def test_the_shares_of_scales_are_those_of_all_elements(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(optimizer__name="accasro", statistics__every=2), tmp_path / "run", reporter)
    statistics = read_statistics(tmp_path / "run" / "statistics.jsonl")
    assert statistics is not None
    elements = sum(np.prod(shape) for shape in statistics.header["shapes"].values())
    for record, shares in zip(statistics.records, scale_shares(statistics), strict=True):
        assert shares.sum() == pytest.approx(1.0)
        counts = [layer["scale"]["histogram"] for layer in record["layers"].values()]
        np.testing.assert_allclose(shares, np.sum(counts, axis=0) / elements)


def test_a_run_without_statistics_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no layer statistics; train with --set statistics\.every=100"):
        draw_layers(tmp_path)
