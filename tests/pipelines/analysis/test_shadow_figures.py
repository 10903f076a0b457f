"""Figures of shadow optimizers: from records of a run, also where values are missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipelines.analysis.shadow_figures import draw_shadows, write_shadow_figures
from pipelines.errors import UsageError
from pipelines.training.shadow_file import (
    RUN,
    Direction,
    Header,
    LayerUpdate,
    LossChange,
    Record,
    shadow_file,
    step_cost,
)

SHAPES = {"blocks.0.up.weight": [4, 3], "blocks.1.up.weight": [4, 3], "blocks.0.up.bias": [4]}


def direction(cosine: float | None, norm: float) -> Direction:
    layer = LayerUpdate(norm=norm, cosine=cosine, singular_values=[2.0 * norm, norm, 0.0])
    change = LossChange(at_lengths=[-0.1, -0.2, math.nan], own=-0.2)
    return Direction(
        updates=1, step_ms=1.0, norm=norm, cosine=cosine, same_batch=change, held_out=change,
        layers=dict.fromkeys(SHAPES, layer),
    )  # fmt: skip


def write_records(run: Path, cosines: list[float | None], norms: list[float]) -> None:
    header = Header(optimizer="asgo", shapes=SHAPES, lengths=[0.5, 1.0, 2.0])
    for step, (cosine, norm) in enumerate(zip(cosines, norms, strict=True), 1):
        directions = {RUN: direction(1.0, 1.0), "muon": direction(cosine, norm)}
        shadow_file(run).append(header, Record(step=step, cost_ms=1.0, directions=directions))


def test_lines_show_what_was_recorded(tmp_path: Path) -> None:
    write_records(tmp_path, [0.5, 0.25], [2.0, 4.0])
    figures = dict(draw_shadows(tmp_path))
    angles, lengths = figures["shadow-steps"].axes
    (legend,) = figures["shadow-steps"].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "muon, 1 ms a step",
        "middle half of the weight matrices",
    ]
    assert [line.get_ydata().tolist() for line in angles.lines] == [[0.5, 0.25]]  # type: ignore[union-attr]
    assert [line.get_ydata().tolist() for line in lengths.lines] == [[2.0, 4.0]]  # type: ignore[union-attr]
    spectrum = figures["shadow-spectra"].axes[0].lines
    assert [line.get_ydata().tolist() for line in spectrum] == [[1.0, 0.5, 0.0]] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ms", "text"), [(0.1234, "0.123 ms"), (999.4, "999 ms"), (1090.4, "1,090 ms"), (27_000, "27,000 ms")]
)
def test_the_cost_of_a_step_is_never_in_powers_of_ten(ms: float, text: str) -> None:
    assert step_cost(ms) == f"{text} a step"


def test_layers_of_one_kind_may_have_different_sizes(tmp_path: Path) -> None:
    """As the convolutions of a residual network have."""
    run = direction(1.0, 1.0)
    run["layers"]["blocks.1.up.weight"] = LayerUpdate(norm=1.0, cosine=1.0, singular_values=[2.0, 1.0, 0.5, 0.25, 0.0])
    header = Header(optimizer="asgo", shapes=SHAPES, lengths=[0.5, 1.0, 2.0])
    shadow_file(tmp_path).append(header, Record(step=1, cost_ms=1.0, directions={RUN: run}))
    (line,) = dict(draw_shadows(tmp_path))["shadow-spectra"].axes[0].lines
    assert line.get_ydata().tolist() == [1.0, 0.625, 0.375, 0.1875, 0.0]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("error")
def test_missing_values_leave_gaps(tmp_path: Path) -> None:
    """Of a shadow without a direction, as in a step of length 0, and of a loss that is not finite."""
    write_records(tmp_path, [None, 0.5], [0.0, 1.0])
    paths = write_shadow_figures(tmp_path, tmp_path / "figures")
    assert [path.name for path in paths if path.suffix == ".png"] == [
        "shadow-steps.png",
        "shadow-losses.png",
        "shadow-spectra.png",
    ]
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.filterwarnings("error")
def test_a_shadow_without_any_finite_value_is_drawn_without_warnings(tmp_path: Path) -> None:
    """As with a learning rate of zero, or weights that overflow."""
    none = LossChange(at_lengths=[math.nan] * 3, own=math.nan)
    nothing = {**direction(None, math.nan), "same_batch": none, "held_out": none}
    header = Header(optimizer="asgo", shapes=SHAPES, lengths=[0.5, 1.0, 2.0])
    directions = {RUN: direction(1.0, 1.0), "muon": nothing}
    shadow_file(tmp_path).append(header, Record(step=1, cost_ms=1.0, directions=directions))  # type: ignore[typeddict-item]
    assert len(write_shadow_figures(tmp_path, tmp_path / "figures")) == 6


def test_a_run_without_shadows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no shadow optimizers; train with --set"):
        draw_shadows(tmp_path)
